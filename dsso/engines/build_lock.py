"""The lock that a killed process leaves on a build of torch's extensions, and behind which every later run would wait.

DeepSpeed builds its operations when they are first asked for (`shm_comm` on the CPU, when its communication starts),
and torch guards a build, and each look whether there is one to do, by a file `lock` in the build's directory. A process
that is killed in that moment leaves the file, and torch waits for it to go, without a message and without an end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils import cpp_extension

from dsso.parallel import collectives

_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "f2fs"})
"""File systems that no other machine writes to."""
_LONGEST_BUILD = 600.0
"""Seconds after which a lock that another machine may hold is taken for left over."""


def remove_stale_lock(name: str) -> None:
    """Remove the lock of a build when no process holds it; collective, before the build is asked for.

    The holder keeps the file open, so a lock that no process of this machine has open is left over, or held by another
    machine that shares the directory.

    Args:
        name: of the extension.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        lock = directory(name) / "lock"
        age = _age(lock)
        if age is not None and not is_held(lock) and (_is_local(lock) or age > _LONGEST_BUILD):
            lock.unlink(missing_ok=True)
            print(f"{lock} was left by a process that was killed while it built {name}: removed", flush=True)
    collectives.barrier()


def directory(name: str) -> Path:
    """Where torch builds an extension, made or not.

    Args:
        name: of the extension.
    """
    return Path(cpp_extension._get_build_directory(name, verbose=False))


def is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open; True where that cannot be known.

    Args:
        lock: the file.
    """
    if not Path("/proc/self/fd").is_dir():
        return True
    target = str(lock.resolve())
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(str(entry.readlink()) == target for entry in folder.iterdir()):
                return True
        except OSError:  # it has ended, or belongs to somebody else, who has a cache of his own
            continue
    return False


def _age(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return None


def _is_local(path: Path) -> bool:
    """Whether a path lies on a file system that only this machine has."""
    kind, longest = "", -1
    try:
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, mount, found, *_ = line.split()
            if path.is_relative_to(mount) and len(mount) > longest:
                kind, longest = found, len(mount)
    except (OSError, ValueError):
        return False
    return kind in _LOCAL
