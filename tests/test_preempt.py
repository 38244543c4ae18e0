"""Signals become an agreed request to stop; a second one leaves at once."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso.preempt import StopRequest, control_device


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request(signum: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), signum)
        time.sleep(0.1)
        assert stop.agreed() == signum
        assert stop.agreed() == signum
    assert f"{signum.name}: writing a checkpoint after this step" in capfd.readouterr().err


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(speak=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.agreed() == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_a_launcher_that_repeats_itself_asks_once() -> None:
    with StopRequest(speak=False, repeat_seconds=30.0) as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
        assert stop.agreed() == signal.SIGINT


def test_a_launcher_may_take_its_time() -> None:
    """Its SIGTERM behind a SIGINT is no second request, also when it comes late; a second SIGINT is one."""
    with StopRequest(speak=False, repeat_seconds=0.1, launcher_seconds=30.0) as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
            time.sleep(0.3)
        assert stop.agreed() == signal.SIGINT


def test_of_two_that_come_together_the_one_of_the_terminal_counts(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank that had no time to run gets Ctrl-C and its launcher's SIGTERM at once, the later number first."""
    both = {signal.SIGINT, signal.SIGTERM}
    with StopRequest() as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for signum in sorted(both):
            signal.pthread_kill(threading.main_thread().ident or 0, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        time.sleep(0.1)
        assert stop.agreed() == signal.SIGINT
    assert "SIGINT: writing a checkpoint after this step" in capfd.readouterr().err


def test_a_scheduler_that_ends_the_job_does_not_ask_again(capfd: pytest.CaptureFixture[str]) -> None:
    """SIGUSR1 minutes before the end, SIGTERM at the end: the checkpoint goes on, however late the second one is."""
    with StopRequest(repeat_seconds=0.0, launcher_seconds=0.0) as stop:
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
            time.sleep(0.1)
        assert stop.agreed() == signal.SIGUSR1
    assert "again" not in capfd.readouterr().err


def test_a_run_may_ask_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        stop.request(signal.SIGUSR1, "no time is left")
        stop.request(signal.SIGTERM, "not said")
        assert stop.agreed() == signal.SIGUSR1
    assert capfd.readouterr().err == "\nno time is left\n"


def test_a_process_with_many_open_files_hears_as_well() -> None:
    """Descriptors above 1023, of which `select` knows nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    held = []
    try:
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        with StopRequest(speak=False) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            assert stop.agreed() == signal.SIGTERM
            assert stop._thread is not None
            assert stop._thread.is_alive()
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_handlers_are_put_back() -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(one) for one in signals]
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(one) for one in signals] == before
    assert signal.set_wakeup_fd(-1) == -1


_BLOCKED = """
import hashlib, sys
sys.path.insert(0, {root!r})
from dsso.preempt import StopRequest
with StopRequest(repeat_seconds=0.2) as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000_000)  # minutes in C: no Python handler can run
"""


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_second_signal_leaves_at_once(signum: signal.Signals, status: int) -> None:
    root = Path(__file__).resolve().parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", _BLOCKED.format(root=str(root))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signum)
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signum)
        _, told = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode == status
    assert f"{signum.name} again: leaving without a checkpoint" in told


def _two_ranks(number: int, directory: str, queue: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=number, world_size=2)
    seen = []
    with StopRequest(speak=False) as stop:
        for step in range(4):
            if step == 2 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(stop.agreed(control_device(torch.device("cpu")) or "cpu"))
    queue.put(seen)
    dist.destroy_process_group()


@pytest.mark.dist
def test_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_two_ranks, args=(n, str(tmp_path), queue)) for n in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert found == [[None, None, signal.SIGTERM, signal.SIGTERM]] * 2


def test_where_the_flag_is_reduced() -> None:
    assert control_device(torch.device("cpu")) == torch.device("cpu")
    # no process group: nothing is reduced
    assert control_device(torch.device("cuda", 0)) == torch.device("cpu")
