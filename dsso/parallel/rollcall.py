"""Which rank is missing: all ranks keep a line in the job's store, and those that are left read it.

A collective call that fails tells one rank that something is wrong, and not with whom. So a thread of every rank writes
a line (host, process, step, what it is doing) to the store that the process group was started with, a few times in the
time-out. A rank whose call has failed asks all others to answer and reads the lines twice: who has ended and why, whose
line stands still (killed, stopped or cut off), and who is alive and where in its code it is. What it finds is put into
the store as well, for ranks that fail later; a rank that still hangs then ends itself and shows where.

The thread touches neither tensors nor devices; to a training loop the roll is one attribute that it sets.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed import distributed_c10d

Store: TypeAlias = Any
"""`torch.distributed.Store`, which has no types of its own."""
_TCPStore: Any = getattr(dist, "TCPStore", None)  # builds of torch without it have no process groups either

STALL = 0.9
"""Share of the time-out in one step after which it is told who is there: NCCL ends a process without a word."""
_BEATS = 20.0
"""Lines a rank writes in a time-out, where that is short."""
_SLOWEST, _FASTEST = 2.0, 0.2
"""Bounds of the time between two lines, in seconds."""
_WAITING = "waiting"
_AGAIN = 10.0
"""Lines left out before a store that was lost is looked for again."""
_LAST_WORDS = 5.0
"""Seconds that a rank which hangs is given to end by itself, once another one has given up."""


@dataclass(frozen=True)
class Line:
    """What one rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int = 0
    """Step that it takes, from 1; 0 before the first."""
    doing: str = "starting"
    since: float = 0.0
    """Time since the epoch when step and doing were last set."""
    beat: int = 0
    """Lines written before this one."""
    at: float = 0.0
    """Time since the epoch when this line was written."""
    where: str = ""
    """Where in its code the main thread is, once somebody has asked."""
    ended: str = ""
    """Why it ends."""

    @property
    def place(self) -> str:
        """What it was doing, in words."""
        return f"in step {self.step}" if self.doing == "step" else f"{self.doing} (step {self.step})"


class Rollcall:
    """The line of this rank, and the way to those of the others.

    Args:
        rank, world_size: of this process.
        timeout: of the collective calls, in seconds.
        address, port: of the job's store.
        prefix: of the keys.
        kept_by_rank_0: the store ends with rank 0; else the launcher keeps it.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        address: str,
        port: int,
        prefix: str,
        kept_by_rank_0: bool = True,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.interval = min(_SLOWEST, max(_FASTEST, timeout / _BEATS))
        self._address, self._port, self._prefix = address, port, prefix
        self._kept_by_rank_0 = kept_by_rank_0
        self._host, self._pid = socket.gethostname(), os.getpid()
        # One assignment each, by one thread each: nothing has to be locked.
        self._said: tuple[int, str, float] = (0, "starting", time.time())
        self._where = self._ended = ""
        self._beat = 0
        self._keeper: Line | None = None
        self._finding = ""
        self._given_up = self._leaving = False
        self._stalled_at = -1.0
        self._stop = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._write(self._connect())
        self._thread = threading.Thread(target=self._keep, name="dsso-rollcall", daemon=True)
        self._thread.start()

    # -- what the run says --------------------------------------------------------------------------------------

    def at(self, step: int, doing: str = "step") -> None:
        """Say where the run is."""
        self._said = (step, doing, time.time())

    def end(self, why: str) -> None:
        """Say why this rank ends, for the others to tell it."""
        self._leaving = True
        self._ended = " ".join(why.split())[:300]
        _within(self.interval + 1.0, lambda: self._write(self._connect()))

    def close(self) -> None:
        """Leave the roll in order."""
        self._stop.set()
        self._thread.join(timeout=self.interval + 1.0)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _connect(self) -> Store:
        wait = timedelta(seconds=max(1.0, 3 * self.interval))
        store = _TCPStore(self._address, self._port, None, False, wait, wait_for_workers=False)
        return distributed_c10d.PrefixStore(self._prefix, store)

    @property
    def _line(self) -> Line:
        """What this rank would say now."""
        mine = (
            self.rank,
            self._host,
            self._pid,
            *self._said,
            self._beat,
            time.time(),
            self._where,
            self._ended,
        )
        return Line(*mine)

    def _write(self, store: Store) -> None:
        self._beat += 1
        store.set(str(self.rank), json.dumps(asdict(self._line)))

    def _keep(self) -> None:
        store: Store | None = None
        given_up_at = again_at = 0.0
        while not self._stop.wait(self.interval):
            try:
                if store is None and time.monotonic() < again_at:
                    raise ConnectionError
                store = store or self._connect()
                if store.check(["asked"]):
                    self._where = _where(self._main)
                self._write(store)
                if self.rank and store.check(["0"]):
                    self._keeper = _read(store, 0)
                if store.check(["finding"]):
                    self._finding = store.get("finding").decode()
                    given_up_at = given_up_at or time.monotonic()
            except Exception:
                # The keeper of the store has gone, or the way to it: whoever waits in a collective call finds out.
                # torch complains on its own about every try, so there are few.
                if store is not None or time.monotonic() >= again_at:
                    again_at = time.monotonic() + _AGAIN * self.interval
                store = None
            self._look_at_the_clock()
            if given_up_at and time.monotonic() - given_up_at > _LAST_WORDS and not self._leaving:
                self._give_up()

    def _look_at_the_clock(self) -> None:
        """Tell once in a step that takes nearly as long as the time-out who is there."""
        line = self._line
        if line.doing != "step" or self._leaving or line.since == self._stalled_at:
            return
        waited = time.time() - line.since
        if waited > STALL * self.timeout:
            self._stalled_at = line.since

            def look() -> None:
                found = self.missing(give_up=False)
                if found:
                    _say(f"rank {self.rank}: {line.place} for {waited:.0f} s; {found}")

            # All ranks may ask at once, and each of them has to answer meanwhile.
            threading.Thread(target=look, daemon=True).start()

    def _give_up(self) -> None:
        """Another rank has ended the run and this one has not noticed: end it, and show where it hangs."""
        if self._given_up:
            return
        self._given_up = True
        _say(
            f"rank {self.rank} hangs {self._line.place}: another rank has given up waiting, and this one is ended."
            " Where its threads are:"
        )
        faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(1)

    # -- asking -------------------------------------------------------------------------------------------------

    def missing(self, give_up: bool = True) -> str:
        """Ask who is there.

        Args:
            give_up: this rank's collective call has failed and it will end; False: it only looks.

        Returns:
            What is wrong with which rank, in words; empty where all answer.
        """
        if give_up:
            self._leaving = True
        if give_up and self._finding:
            return self._finding
        told: list[str] = []
        # A store that is stopped accepts connections and never answers: whatever happens there has an end here.
        if not _within(self._patience + 4 * self.interval + 3.0, lambda: told.append(self._ask(give_up))):
            return self._no_answer()
        return told[0]

    def _ask(self, give_up: bool) -> str:
        store = self._connect()
        if give_up and store.check(["finding"]):
            return str(store.get("finding").decode())
        before = _read_all(store, self.world_size)
        store.set("asked", str(self.rank))
        deadline = time.monotonic() + self._patience
        while True:
            after = _read_all(store, self.world_size)
            if all(self._known(*pair) for pair in zip(before, after, strict=True)):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(self.interval / 2)
        found = describe(before, after, self.rank, time.time())
        if give_up and found:
            store.set("finding", f"{found} [as rank {self.rank} found]")
            # The others' threads read it, those of the ranks that hang too, and the store may end with this process.
            time.sleep(2.0 * self.interval)
        return found

    @property
    def _patience(self) -> float:
        """Seconds in which a rank that is there answers, on a busy machine as well."""
        return 4 * self.interval + 2.0

    def _known(self, old: Line | None, new: Line | None) -> bool:
        """Whether nothing more has to be waited for to judge a rank."""
        if new is None or new.rank == self.rank or new.ended:
            return new is not None
        gone = new.host == self._host and not _state(new.pid)
        return gone or (old is not None and new.beat > old.beat and bool(new.where))

    def _no_answer(self) -> str:
        if self._finding:
            return self._finding
        if not self._kept_by_rank_0:
            return f"the launcher's store at {self._address}:{self._port} does not answer, so no rank is heard of"
        if self.rank == 0 or self._keeper is None:
            return f"rank 0, whose store at {self._address}:{self._port} keeps the roll, did not answer"
        return f"{_silent(self._keeper, self._host, time.time())}; rank 0 keeps the roll"


def describe(before: list[Line | None], after: list[Line | None], me: int, now: float) -> str:
    """Say what is wrong with which rank.

    Args:
        before: lines of all ranks; None: a rank has none.
        after: the same, a few beats later.
        me: the rank that reads.
        now: time since the epoch.

    Returns:
        Silent ranks and those that ended by an error of their own, else those that hang; empty where there are none.
    """
    own = after[me]
    host = own.host if own is not None else ""
    ended, silent, busy = [], [], []
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if rank == me:
            continue
        if new is None:
            silent.append(f"rank {rank} has not come")
        elif new.ended:
            ended.append(f"rank {rank} (host {new.host}) ended {new.place}: {new.ended}")
        elif old is not None and old.beat == new.beat:
            silent.append(_silent(new, host, now))
        elif new.where and not new.where.startswith(_WAITING):
            busy.append(
                f"rank {rank} (host {new.host}, process {new.pid}) answers, but has been {new.place} for"
                f" {now - new.since:.0f} s, {new.where}"
            )
    return "; ".join([*silent, *ended] or busy)


def _silent(line: Line, host: str, now: float) -> str:
    told = (
        f"rank {line.rank} did not answer: last heard of {line.place}, {max(0.0, now - line.at):.0f} s ago"
        f" (host {line.host}, process {line.pid}"
    )
    if line.host == host:
        told += {
            "": ", which has gone: killed from outside, for want of memory say",
            "T": ", which is stopped",
        }.get(_state(line.pid), ", which is still there")
    else:
        told += "; its process or its machine has gone, or the network between"
    return f"{told})"


def _state(pid: int) -> str:
    """State of a process of this machine as /proc has it; empty: it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if state in {"Z", "X"} else "T" if state in {"T", "t"} else state


def _where(thread: int) -> str:
    """The innermost frame of a thread that belongs neither to Python nor to torch; or that it waits for other ranks."""
    frame = sys._current_frames().get(thread)
    first = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "torch/distributed" in name or "deepspeed/comm" in name:
            return f"{_WAITING} for other ranks"
        if not first and "/torch/" not in name and not name.startswith("<"):
            first = f"at {'/'.join(Path(name).parts[-3:])}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return first


def _read(store: Store, rank: int) -> Line | None:
    return Line(**json.loads(store.get(str(rank)))) if store.check([str(rank)]) else None


def _read_all(store: Store, world_size: int) -> list[Line | None]:
    return [_read(store, rank) for rank in range(world_size)]


def _within(seconds: float, action: Callable[[], object]) -> bool:
    """Run something that may never return, in a thread; whether it did, without an error, in time."""
    done: list[bool] = []

    def run() -> None:
        try:
            action()
            done.append(True)
        except Exception:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _say(message: str) -> None:
    # not print(): the main thread may hold the lock of the stream
    os.write(2, f"\n{message}\n".encode())


# -- the roll of this process -----------------------------------------------------------------------------------

_ROLL: list[Rollcall] = []


def start(timeout: float) -> None:
    """Begin the roll of this process, where ranks were started through the environment; else there is none.

    Args:
        timeout: of the collective calls, in seconds.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if _ROLL or not dist.is_initialized() or dist.get_world_size() == 1 or not address or not port:
        return
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A launcher that starts the ranks again keeps its store: every attempt has a roll of its own.
    prefix = f"dsso/rollcall/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        _ROLL.append(
            Rollcall(dist.get_rank(), dist.get_world_size(), timeout, address, int(port), prefix, not agent)
        )
    except (RuntimeError, ValueError) as error:  # another kind of store
        _say(f"rank {dist.get_rank()}: no roll is kept, so no message will name a missing rank ({error})")


def at(step: int, doing: str = "step") -> None:
    """Say where this rank is.

    Args:
        step: that is being taken, from 1.
        doing: `step`, or words for something else.
    """
    for roll in _ROLL:
        roll.at(step, doing)


def end(why: str) -> None:
    """Say why this rank ends before the others."""
    for roll in _ROLL:
        roll.end(why)


def missing() -> str:
    """Which ranks are missing and what is known of them, when a collective call has failed; empty: not known."""
    return _ROLL[0].missing() if _ROLL else ""


def stop() -> None:
    """End the roll of this process in order, while all ranks are there."""
    while _ROLL:
        _ROLL.pop().close()
