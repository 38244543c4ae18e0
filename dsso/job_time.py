"""How long a run may go on: until its own limit or that of its Slurm job, less what leaving takes.

A run that is killed at the end of its time loses what it did since the last checkpoint. So it measures how long its
steps, evaluations and checkpoints take and leaves while there is time for one more of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import psutil

_UNKNOWN_SAVE_SECONDS = 60.0
"""What a checkpoint may take while none has been written."""
_REMEMBERED = 20
_MARGIN = 1.5
_LEAVING_SECONDS = 5.0
"""Closing files, ending processes, and the scheduler's own time."""


class JobTime:
    """The time that a run has left.

    Args:
        end: when it is over, as seconds of the epoch; None: never.
        file: where it is kept for later starts what a checkpoint takes; None: it is not.
        clock: seconds of the epoch.
    """

    def __init__(
        self, end: float | None, file: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.end = end
        self.save_seconds: float | None = None
        """What the slowest checkpoint took; None: none was written yet."""
        self._file = file
        if file is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.save_seconds = float(json.loads(file.read_text(encoding="utf-8"))["save_seconds"])
        self._clock = clock
        self._rounds: dict[bool, deque[float]] = {kind: deque(maxlen=_REMEMBERED) for kind in (False, True)}
        self._began = clock()

    def round_began(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def round_ended(self, evaluated: bool) -> None:
        """It has ended, with what belongs to it, but for a checkpoint.

        Args:
            evaluated: with an evaluation.
        """
        self._rounds[evaluated].append(self._clock() - self._began)

    def saved(self, seconds: float) -> None:
        """A checkpoint was written.

        Args:
            seconds: what it took.
        """
        if self.save_seconds is not None and seconds <= self.save_seconds:
            return
        self.save_seconds = seconds
        if self._file is not None:
            # Not worth an error: a later start guesses then.
            with contextlib.suppress(OSError):
                self._file.write_text(json.dumps({"save_seconds": seconds}) + "\n", encoding="utf-8")

    def needed(self, evaluates: bool, saves: bool = False) -> float:
        """Seconds that another step and an orderly end take, generously.

        Args:
            evaluates: an evaluation belongs to that step.
            saves: a checkpoint is due before it.
        """
        rounds = max(self._rounds[False], default=0.0)
        if evaluates:
            rounds = max(self._rounds[True], default=rounds)
        save = _UNKNOWN_SAVE_SECONDS if self.save_seconds is None else self.save_seconds
        return _MARGIN * (rounds + save * (1 + saves)) + _LEAVING_SECONDS

    def is_up(self, evaluates: bool, saves: bool = False) -> str | None:
        """Why the run has to leave now; None: there is time for another step.

        Args:
            evaluates: an evaluation belongs to that step.
            saves: a checkpoint is due before it.
        """
        if self.end is None:
            return None
        left, needed = self.end - self._clock(), self.needed(evaluates, saves)
        if left > needed:
            return None
        return (
            f"{max(left, 0.0):.0f} s are left of the job, another step and a checkpoint may take {needed:.0f} s:"
            " writing a checkpoint, then leaving"
        )


def process_start() -> float:
    """When this process began, as seconds of the epoch: imports take their part of the time."""
    return float(psutil.Process().create_time())


def end_of_job(
    limit_minutes: float | None, started: float, env: Mapping[str, str] | None = None
) -> float | None:
    """When the time of this process is over, as seconds of the epoch; None: nobody has set a limit.

    Args:
        limit_minutes: `dsso.train.time_limit_minutes`.
        started: when the process began, as seconds of the epoch.
        env: environment variables; None: those of the process.
    """
    env = os.environ if env is None else env
    ends = [] if limit_minutes is None else [started + 60 * limit_minutes]
    told = env.get("SLURM_JOB_END_TIME", "")
    if told.isdigit() and int(told) > 0:
        ends.append(float(told))
    elif env.get("SLURM_JOB_ID"):
        asked = _ask_slurm(env["SLURM_JOB_ID"])
        ends += [] if asked is None else [asked]
    return min(ends, default=None)


def _ask_slurm(job: str) -> float | None:
    """The end of a job as `squeue` knows it; None where it does not, or is not there (in a container, say)."""
    program = shutil.which("squeue")
    if program is None:
        return None
    words = [program, "--noheader", "--jobs", job, "--format", "%e"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        return datetime.fromisoformat(done.stdout.strip().splitlines()[0]).timestamp()
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
