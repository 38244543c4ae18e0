"""One point of a sweep: `launch/train.py` in a process of its own, watched, stopped when it diverges.

The process has a process group of its own, to which signals are passed on: a launcher and its ranks get them together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from dsso.errors import RecipeError, RunError
from dsso.sweep.format import Diverged
from dsso.sweep.points import Point
from dsso.sweep.record import LOG, Ending, directory, ending, why_diverged, write_ending

ROOT = Path(__file__).resolve().parent.parent
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that reach the run. A closed terminal's SIGHUP reaches it as SIGTERM, so that it writes a checkpoint."""
POLL_SECONDS = 0.5
"""Between two looks at a run's files."""
GRACE_SECONDS = 120.0
"""A run that diverged has so long to end by itself; so have the ranks of a launcher that has ended already."""
_SAID = re.compile(r"^(?:rank \d+: )?(?:recipe )?error: (.+)")
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception|Interrupt)\b.*")


class Busy(RunError):
    """Another process runs the point."""


class Signals:
    """Context manager that passes signals on to the process group of the run under way.

    Attributes:
        signum: the first signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._group: int | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for one in FORWARDED:
            # With nohup, a closed terminal is to make no difference.
            if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN:
                self._old[one] = signal.signal(one, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._old.items():
            signal.signal(one, handler)

    def follow(self, group: int | None) -> None:
        """Pass signals on to this process group from now on; one that came just before it was there, too."""
        self._group = group
        if group is not None and self.signum is not None:
            self._send(self.signum)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
        self._send(signum)

    def _send(self, signum: int) -> None:
        if self._group is not None:
            send(self._group, signal.SIGTERM if signum == signal.SIGHUP else signum)


def send(group: int, signum: int) -> bool:
    """Signal a process group; false where it is gone."""
    try:
        os.killpg(group, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def run_point(
    point: Point,
    out: Path,
    launcher: Sequence[str],
    rule: Diverged | None,
    signals: Signals,
    follow: bool = False,
) -> Ending:
    """Run a point to its end, or go on with it; returns how it ended.

    Args:
        point: which.
        out: directory of the sweep.
        launcher: what stands before `launch/train.py`; empty: this Python. `{port}` in it becomes a free port.
        rule: when it counts as diverged.
        signals: entered; passed on to the run.
        follow: copy what the run says to the standard output.

    Raises:
        Busy: another process runs it.
    """
    folder = directory(out, point.name)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        before = ending(folder)
        if before.state == "diverged":
            return before
        if before.state != "finished":
            write_ending(folder, point, Ending("started"))
            log = folder / LOG
            start = log.stat().st_size if log.exists() else 0
            status = _run(_command(launcher, folder), folder, lock, rule, signals, follow)
            found = _judged(folder, rule, status, start, signals.signum)
        else:
            found = _judged(folder, rule, 0, 0, None)
        write_ending(folder, point, found)
        return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the point; the run inherits the lock, so that it outlives a sweep that is killed."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy("another process runs this point", where=str(folder)) from None
            # A file system without locks: two sweeps in one directory are then the user's to avoid.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield handle
    finally:
        os.close(handle)


def _command(launcher: Sequence[str], folder: Path) -> list[str]:
    head = list(launcher) or [sys.executable]
    if any("{port}" in word for word in head):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        head = [word.replace("{port}", port) for word in head]
    recipe = folder / "recipe.json"
    words = ["--ds_config", recipe, "--output_dir", folder, "--resume", "auto"]
    return [*head, str(ROOT / "launch" / "train.py"), *map(str, words)]


def _run(
    command: Sequence[str], folder: Path, lock: int, rule: Diverged | None, signals: Signals, follow: bool
) -> int:
    """The exit status, 128 + signal for a process that a signal ended."""
    with (folder / LOG).open("ab") as log, (folder / LOG).open("rb") as said:
        said.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        # A session's group has the number of its first process.
        signals.follow(process.pid)
        try:
            _watch(process, folder, rule, (lambda: _copy(said)) if follow else lambda: None)
            signals.follow(None)
            _wait_for_ranks(process.pid)
        finally:
            signals.follow(None)
            send(process.pid, signal.SIGKILL)
            process.wait()
        if follow:
            _copy(said)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _watch(
    process: subprocess.Popen[bytes], folder: Path, rule: Diverged | None, each: Callable[[], None]
) -> None:
    """Wait for the end; a run that diverges is asked to end, and made to after a while."""
    path = folder / "metrics.jsonl"
    seen: tuple[float, int] | None = None
    deadline: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        each()
        if process.returncode is not None:
            return
        if deadline is not None:
            if time.monotonic() > deadline:
                send(process.pid, signal.SIGKILL)
            continue
        # What cannot be read now, because it is being written, is read again when there is more, and at the end.
        with contextlib.suppress(FileNotFoundError, RecipeError):
            state = path.stat()
            if seen != (state.st_mtime, state.st_size):
                seen = (state.st_mtime, state.st_size)
                if why_diverged(folder, rule):
                    send(process.pid, signal.SIGTERM)
                    deadline = time.monotonic() + GRACE_SECONDS


def _wait_for_ranks(group: int) -> None:
    """A launcher may end before its ranks, which write a checkpoint."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and _alive(group):
        time.sleep(0.1)


def _alive(group: int) -> bool:
    """Whether a process of the group is still running; those that have ended and wait for their parent do not count."""
    if not send(group, 0):
        return False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in ("Z", "X"):
                return True
    return False


def _copy(said: Any) -> None:
    sys.stdout.buffer.write(said.read())
    sys.stdout.buffer.flush()


def _judged(folder: Path, rule: Diverged | None, status: int, start: int, signum: int | None) -> Ending:
    """How a run that has ended did so: by its log first, so that it makes no difference when it was looked at."""
    try:
        reason = why_diverged(folder, rule)
    except RecipeError as error:
        return Ending("failed", " ".join(str(error).split()), status)
    if reason:
        return Ending("diverged", reason, status)
    if (folder / "summary.json").exists():  # the last thing that a run writes
        return Ending("finished", status=status)
    if signum is None and status - 128 in FORWARDED:
        signum = status - 128
    # Of launchers, some end with 1 at a signal.
    if signum is not None and status != RecipeError.exit_status:
        return Ending("stopped", f"by {signal.Signals(signum).name}", status)
    return Ending("failed", _reason(folder / LOG, start, status), status)


def _reason(log: Path, start: int, status: int) -> str:
    """What a run that failed said last, in one line."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    for pattern, order in ((_SAID, lines), (_RAISED, lines[::-1])):
        for line in order:
            found = pattern.match(line)
            if found:
                return (found[1] if pattern is _SAID else found[0])[:300]
    if status == 128 + signal.SIGKILL:
        return "killed by SIGKILL, for want of memory maybe"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return (last or f"exit status {status}")[:300]
