"""A lock that a killed process has left on a build of torch's extensions is removed, one that is held is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsso.engines import build_lock

NAME = "some_extension"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch looks for the lock of a build, in a cache of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_lock, "_is_local", lambda path: True)
    return build_lock.directory(NAME) / "lock"


def hold(lock: Path) -> subprocess.Popen[str]:
    """A process that builds, as torch's own baton does it."""
    program = (
        "import sys, time; from torch.utils.file_baton import FileBaton; baton = FileBaton(sys.argv[1]);"
        " assert baton.try_acquire(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.timeout(120)
def test_a_lock_goes_with_the_process_that_held_it(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = hold(lock)
    try:
        build_lock.remove_stale_lock(NAME)
        assert lock.exists(), "somebody builds"
    finally:
        process.kill()
        process.wait()
    assert lock.exists(), "or torch takes care of it by itself now"
    build_lock.remove_stale_lock(NAME)
    assert not lock.exists()
    assert "was left by a process that was killed while it built some_extension" in capsys.readouterr().out


def test_one_of_another_machine_is_given_time(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "_is_local", lambda path: False)
    lock.touch()
    build_lock.remove_stale_lock(NAME)
    assert lock.exists()
    before = time.time() - 700
    os.utime(lock, (before, before))
    build_lock.remove_stale_lock(NAME)
    assert not lock.exists()


def test_other_local_ranks_leave_it_alone(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    build_lock.remove_stale_lock(NAME)
    assert lock.exists()


def test_file_systems() -> None:
    assert build_lock._is_local(Path("/")) in (True, False)
    assert not build_lock._is_local(Path("/proc"))
