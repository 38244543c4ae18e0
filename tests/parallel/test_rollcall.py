"""Which rank is missing: what the lines of the ranks say, and a roll of several in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist

from dsso.parallel import rollcall
from dsso.parallel.rollcall import Line, Rollcall, describe

NOW = 1000.0


def line(rank: int, **changes: object) -> Line:
    """A rank that answers, in step 7."""
    first = Line(rank, "here", os.getpid(), 7, "step", NOW - 5.0, 3, NOW, "waiting for other ranks")
    return replace(first, **changes)  # type: ignore[arg-type]


def later(one: Line | None) -> Line | None:
    """The same rank a beat later."""
    return None if one is None else replace(one, beat=one.beat + 1)


def test_all_answer() -> None:
    lines = [line(rank) for rank in range(3)]
    assert describe(lines, [later(one) for one in lines], 0, NOW) == ""


def test_a_rank_elsewhere_stands_still() -> None:
    lines: list[Line | None] = [line(0), line(1, host="there", pid=12, at=NOW - 9.0), line(2)]
    told = describe(lines, [later(lines[0]), lines[1], later(lines[2])], 0, NOW)
    assert told == (
        "rank 1 did not answer: last heard of in step 7, 9 s ago (host there, process 12; its process or its machine"
        " has gone, or the network between)"
    )


def test_a_process_of_this_machine_that_was_killed_has_gone_and_a_stopped_one_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        still = line(1, pid=process.pid)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        assert "which is stopped" in describe([line(0), still], [line(0), still], 0, NOW)
    finally:
        process.kill()
    time.sleep(0.2)  # not waited for: nobody has asked yet how it ended
    assert "which has gone: killed from outside" in describe([line(0), still], [line(0), still], 0, NOW)
    process.wait()
    assert "which has gone" in describe([line(0), still], [line(0), still], 0, NOW)


def test_an_error_of_a_rank_is_told_and_one_that_hangs_is_told_only_without_worse() -> None:
    hangs = line(1, where="at launch/loop.py:10 (window)", doing="evaluating")
    lines: list[Line | None] = [line(0), hangs, line(2)]
    after = [later(one) for one in lines]
    told = describe(lines, after, 0, NOW)
    assert told.startswith("rank 1 (host here")
    assert "answers, but has been evaluating (step 7) for 5 s, at launch/loop.py:10 (window)" in told
    ended = [after[0], after[1], line(2, ended="ValueError: a surprise")]
    assert describe(lines, ended, 0, NOW) == "rank 2 (host here) ended in step 7: ValueError: a surprise"
    assert "rank 1 has not come" in describe([line(0), None], [line(0), None], 0, NOW)


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    """A store in this process, with a port of its own."""
    yield dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def roll(store: dist.TCPStore, rank: int, timeout: float = 4.0) -> Rollcall:
    """One rank of three."""
    return Rollcall(rank, 3, timeout, "127.0.0.1", store.port, "test")


def test_three_ranks_of_which_one_falls_silent(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "_where", lambda thread: "waiting for other ranks")
    rolls = [roll(store, rank) for rank in range(3)]
    for one in rolls:
        one.at(5)
    time.sleep(3 * rolls[0].interval)
    assert rolls[0].missing(give_up=False) == ""
    rolls[1].close()
    told = rolls[0].missing()
    assert told.startswith("rank 1 did not answer: last heard of in step 5, ")
    # whoever fails later, is told the same, and does not ask again
    begun = time.monotonic()
    assert rolls[2].missing() == f"{told} [as rank 0 found]"
    assert time.monotonic() - begun < 1.0
    rolls[0].close()
    rolls[2].close()


def test_a_rank_that_ends_by_an_error_says_why(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "_where", lambda thread: "waiting for other ranks")
    rolls = [roll(store, rank) for rank in range(3)]
    rolls[2].at(4, "writing a checkpoint")
    rolls[2].end("OSError: the disk\nis full")
    told = rolls[0].missing()
    assert "ended writing a checkpoint (step 4): OSError: the disk is full" in told
    for one in rolls:
        one.close()


def test_the_keeper_of_the_roll_is_gone() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    keeper, mine = roll(server, 0, 2.0), roll(server, 1, 2.0)
    keeper.at(3)
    time.sleep(4 * keeper.interval)
    keeper.close()
    del keeper, server
    begun = time.monotonic()
    told = mine.missing()
    assert told.startswith("rank 0 did not answer: last heard of in step 3"), told
    assert time.monotonic() - begun < 10.0
    mine.close()


@pytest.mark.timeout(120)
def test_the_keeper_of_the_roll_is_stopped_and_answers_nobody() -> None:
    program = (
        "import torch.distributed as d, time; s = d.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False);"
        " print(s.port, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        mine = Rollcall(1, 2, 2.0, "127.0.0.1", port, "test")
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        told = mine.missing()
        assert told == f"rank 0, whose store at 127.0.0.1:{port} keeps the roll, did not answer"
        assert time.monotonic() - begun < 12.0
        mine.close()
    finally:
        process.kill()
        process.wait()


def test_a_step_that_takes_nearly_as_long_as_the_time_out_is_told(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(rollcall, "_say", said.append)
    monkeypatch.setattr(rollcall, "_where", lambda thread: "waiting for other ranks")
    rolls = [roll(store, rank, 1.0) for rank in range(2)]
    for one in rolls:
        one.at(6)
    deadline = time.monotonic() + 15.0
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    # Both ask at the same time and both answer: what is wrong is said of the third alone.
    assert sorted(told.partition(" for ")[0] for told in said) == ["rank 0: in step 6", "rank 1: in step 6"]
    assert all(told.endswith(" s; rank 2 has not come") for told in said), said
    for one in rolls:
        one.close()


def test_where_the_main_thread_is() -> None:
    told = rollcall._where(threading.main_thread().ident or 0)
    assert "tests/parallel/test_rollcall.py" in told or "dsso/parallel/rollcall.py" in told


def test_without_a_process_group_there_is_no_roll() -> None:
    rollcall.start(60.0)
    rollcall.at(1)
    assert rollcall.missing() == ""
    rollcall.stop()
