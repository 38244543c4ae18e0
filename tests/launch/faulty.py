"""`launch/train.py` with something going wrong on one rank at one step: `DSSO_FAULT=kind:rank:step`.

Kinds: `nan` (the loss, from that step on), `die` (SIGKILL), `raise` (an error nobody foresaw), `hang`, `term`
(SIGTERM), `stop` (SIGSTOP), `drift` (one bit of its copy of the first trained parameter flips), `full` (no room on the
disk while that rank writes its part of the checkpoint after `step` steps), `slow` (each of its files takes a while),
`cut` (its network goes down, which must be one of its own), and of the file system at `DSSO_FAULT_PLACE`, which must be
one of its own: `fill` (until it is full), `readonly` (for all ranks), `mine-readonly` (for that rank). And with the
number of the refresh in the place of the step: `stop-statistics` (asleep before the first bucket of statistics leaves),
`stop-refresh` and `die-refresh` (asleep, or killed, between its statistics and the end of the factorizations).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from launch import train

KIND, WHERE, WHEN = os.environ["DSSO_FAULT"].split(":")
# A launcher that starts the ranks again after the fault is to succeed.
FIRST = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
MINE = FIRST and os.environ.get("RANK", "0") == WHERE
PLACE = Path(os.environ.get("DSSO_FAULT_PLACE", "."))
NEW_MOUNTS = 0x00020000
"""`CLONE_NEWNS` of unshare(2)."""


def break_loop() -> None:
    """Put the fault into the loop."""
    from dsso.tasks import PreparedTask
    from launch.loop import Loop

    whole, honest = Loop._window, PreparedTask.loss_sum
    current = {"step": 0}

    def window(loop: Loop) -> None:
        current["step"] = loop.step
        if loop.step == int(WHEN):
            if KIND == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif KIND == "raise":
                raise ValueError("a surprise")
            elif KIND == "hang":
                time.sleep(300)
            elif KIND == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif KIND == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif KIND == "cut":
                subprocess.run(["ip", "link", "set", "inside", "down"], check=True)
            elif KIND == "fill":
                fill_place()
            elif KIND == "readonly":
                # Files that are open stay so, which would keep the mount itself from being changed: one on top of it.
                subprocess.run(["mount", "--bind", PLACE, PLACE], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", PLACE], check=True)
            elif KIND == "mine-readonly":
                make_mine_readonly()
            elif KIND == "drift":
                name = min(loop.engine.optimizer.table.sizes)
                bits = dict(loop.engine.module.named_parameters())[name].data.view(torch.int32).flatten()
                bits[0] ^= 1
        whole(loop)

    def loss_sum(ready: Any, outputs: Any, batch: Any) -> torch.Tensor:
        loss = honest(ready, outputs, batch)
        return loss * float("nan") if KIND == "nan" and current["step"] >= int(WHEN) else loss

    Loop._window = window  # type: ignore[method-assign]
    PreparedTask.loss_sum = loss_sum  # type: ignore[method-assign]


def fill_place() -> None:
    """Leave no room on the file system."""
    with contextlib.suppress(OSError), (PLACE / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def make_mine_readonly() -> None:
    """Let this thread alone see the file system as one that nobody may write to."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    # Processes that this thread starts see what it sees.
    for options in (["--make-rprivate", "/"], ["-o", "remount,bind,ro", str(PLACE)]):
        subprocess.run(["mount", *options], check=True)


def slow_files() -> None:
    """Let each file of a checkpoint take a while."""
    from dsso.engines import portable

    save = portable.save_file

    def slow(tensors: Any, file: Path) -> None:
        time.sleep(float(os.environ.get("DSSO_FAULT_SECONDS", "1")))
        save(tensors, file)

    portable.save_file = slow


def fill_disk() -> None:
    """Let the engine's own writing meet a full disk."""
    from dsso.engines import portable

    save = portable.save_file

    def full(tensors: Any, file: Path) -> None:
        if f"step_{int(WHEN):08d}" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    portable.save_file = full


def break_refresh() -> None:
    """Stop in the middle of a refresh: statistics are on the wire, the other ranks wait for this one's part."""
    from dsso.optim._refresh import Refresh

    whole = Refresh._floor

    def floor(refresh: Refresh, *arguments: Any) -> Any:
        if int(WHEN) == calls["made"]:
            if KIND == "die-refresh":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)
        calls["made"] += 1
        return whole(refresh, *arguments)

    calls = {"made": 0}
    Refresh._floor = floor  # type: ignore[method-assign]


def break_statistics() -> None:
    """Stop before the first bucket of a round: the other ranks wait in the process group of the statistics."""
    from dsso.optim._statistics import Statistics

    whole = Statistics.average

    def average(statistics: Statistics, *arguments: Any) -> None:
        calls["made"] += 1
        return whole(statistics, *arguments)

    def measured_badly(statistics: Statistics) -> Any:
        if int(WHEN) == calls["made"]:
            time.sleep(300)
        return send(statistics)

    calls, send = {"made": 0}, Statistics.measured_badly
    Statistics.average = average  # type: ignore[method-assign]
    Statistics.measured_badly = measured_badly  # type: ignore[method-assign]
    Statistics._final = lambda statistics, key: None  # type: ignore[method-assign]


if MINE:
    {
        "full": fill_disk,
        "slow": slow_files,
        "stop-statistics": break_statistics,
        "stop-refresh": break_refresh,
        "die-refresh": break_refresh,
    }.get(KIND, break_loop)()
sys.exit(train.main())
