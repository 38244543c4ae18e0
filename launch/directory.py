"""The output directory of a run: made by rank 0, and seen and written by all ranks before anything is trained."""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from dsso.errors import RecipeError
from dsso.parallel.collectives import broadcast_object, gather_objects, problem_on_rank_0, rank
from launch.prepare import Job

PATIENCE = 10.0
"""Seconds in which what rank 0 has written appears on other nodes of a shared file system."""


def open_directory(job: Job) -> None:
    """Make the output directory, without the run that is overwritten; collective.

    Every rank writes its part of a checkpoint there and reads those of others, so every rank tries both now.

    Args:
        job: from `prepare`.

    Raises:
        RecipeError: on all ranks, where one of them cannot write there, or does not see what rank 0 writes.
    """
    token = job.output_dir / broadcast_object(f".seen-{uuid.uuid4().hex}")

    def open_it() -> None:
        for path in job.resume.remove:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        job.output_dir.mkdir(parents=True, exist_ok=True)
        (job.output_dir / "summary.json").unlink(missing_ok=True)  # written at the end, again
        token.touch()

    problem = problem_on_rank_0(open_it)
    if problem is not None:
        raise _unwritable(job.output_dir, 0, broadcast_object(platform.node()), problem)
    found = gather_objects((platform.node(), *_look(token)))
    if rank() == 0:
        with contextlib.suppress(OSError):
            token.unlink()
    for who, (host, seen, problem) in enumerate(found):
        if not seen:
            raise RecipeError(
                f"rank {who} on {host} does not see what rank 0 on {found[0][0]} writes there",
                where=f"output_dir {job.output_dir}",
                remedy="give an --output_dir on a file system that all nodes share",
            )
        if problem is not None:
            raise _unwritable(job.output_dir, who, host, problem)


def _unwritable(directory: Path, who: int, host: str, problem: str) -> RecipeError:
    return RecipeError(
        f"rank {who} on {host} cannot write there ({problem})",
        where=f"output_dir {directory}",
        remedy="mount it for writing on every node, or give another --output_dir",
    )


def _look(token: Path) -> tuple[bool, str | None]:
    """Whether this rank sees the token, and what goes wrong where it writes beside it, or None."""
    deadline = time.monotonic() + PATIENCE
    while not token.exists():
        if time.monotonic() > deadline:
            return False, None
        time.sleep(0.2)
    try:
        with tempfile.TemporaryFile(dir=token.parent):
            return True, None
    except OSError as error:
        return True, str(error)
