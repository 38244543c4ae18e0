"""When a run leaves by itself, so that its checkpoint is whole before its time is up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsso.job_time import JobTime, end_of_job, process_start


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rounds(run: JobTime, clock: Clock, *seconds: float, evaluated: bool = False) -> None:
    for one in seconds:
        run.round_began()
        clock.now += one
        run.round_ended(evaluated)


def test_it_leaves_while_a_step_and_a_checkpoint_fit() -> None:
    clock = Clock()
    run = JobTime(1600.0, clock=clock)
    rounds(run, clock, 10.0)
    run.saved(40.0)
    # 1.5 * (10 + 40) + 5 seconds
    clock.now = 1600.0 - 81.0
    assert run.is_up(evaluates=False) is None
    clock.now += 2.0
    told = run.is_up(evaluates=False)
    assert told is not None
    assert "79 s are left of the job, another step and a checkpoint may take 80 s" in told


def test_evaluations_and_checkpoints_that_are_due_count() -> None:
    clock = Clock()
    run = JobTime(10_000.0, clock=clock)
    rounds(run, clock, 1.0, 1.0)
    run.saved(10.0)
    plain = run.needed(evaluates=False)
    assert run.needed(evaluates=False, saves=True) - plain == pytest.approx(15.0)
    assert run.needed(evaluates=True) == plain, "none was seen yet"
    rounds(run, clock, 61.0, evaluated=True)
    assert run.needed(evaluates=True) - plain == pytest.approx(90.0)
    assert run.needed(evaluates=False) == plain


def test_what_is_not_known_yet_and_what_is_long_ago() -> None:
    clock = Clock()
    run = JobTime(10_000.0, clock=clock)
    rounds(run, clock, 300.0)  # a first step that compiles
    assert run.needed(evaluates=False) == pytest.approx(1.5 * (300 + 60) + 5)
    rounds(run, clock, *[1.0] * 20)
    run.saved(2.0)
    run.saved(1.0)
    assert run.needed(evaluates=False) == pytest.approx(1.5 * (1 + 2) + 5)


def test_the_slowest_checkpoint_of_earlier_starts_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    first = JobTime(10_000.0, file)
    assert first.save_seconds is None
    for seconds in (20.0, 30.0, 10.0):
        first.saved(seconds)
    assert JobTime(10_000.0, file).save_seconds == 30.0
    file.write_text("{")
    assert JobTime(10_000.0, file).save_seconds is None
    JobTime(10_000.0, tmp_path / "missing" / "seconds.json").saved(1.0)


def test_without_a_limit_it_never_leaves() -> None:
    assert JobTime(None).is_up(evaluates=True) is None


def test_the_earlier_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_of_job(None, 500.0, {}) is None
    assert end_of_job(2.0, 500.0, {}) == 620.0
    assert end_of_job(2.0, 500.0, {"SLURM_JOB_END_TIME": "560"}) == 560.0
    assert end_of_job(1.0, 500.0, {"SLURM_JOB_END_TIME": "900"}) == 560.0
    # Slurm without that variable is asked
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 7 ] && echo 2030-01-02T03:04:05 || echo N/A\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    expected = time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1))
    assert end_of_job(None, 500.0, {"SLURM_JOB_ID": "7"}) == expected
    assert end_of_job(None, 500.0, {"SLURM_JOB_ID": "8"}) is None, "a job without a limit"
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert end_of_job(3.0, 500.0, {"SLURM_JOB_ID": "7"}) == 680.0
    squeue.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert end_of_job(None, 500.0, {"SLURM_JOB_ID": "7"}) is None


def test_imports_count() -> None:
    assert 0 < process_start() < time.time()
