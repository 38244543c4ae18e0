"""Checkpoints that are whole or do not exist: written aside, sealed by a manifest, then renamed into place.

```
checkpoints/
  step_00000200/        what the engine wrote, and
    run/rank_00000.pt   what one rank needs besides (random number generators, running sums)
    manifest.json       written last: step, world size, size and SHA-256 of every other file
  latest                name of the newest one, for people and scripts; nothing here reads it
  .writing-…            one that is being written or removed; a crash leaves it behind, the next save removes it
  .replaced-step_…      one whose step is being written again, until the new one is in its place
```
A directory without a manifest, or whose files differ from it, is never loaded: the one before is used. At every
moment the newest that was whole is still there under one of its names, so a process may be killed at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsso.errors import OtherRankError, RecipeError, RunError
from dsso.parallel.collectives import barrier, gather_objects, rank, world_size

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1
_TAG = re.compile(r"step_(\d{8,})")
_HIDDEN = ".writing-"
_REPLACED = ".replaced-"


class CheckpointError(RunError):
    """A checkpoint could not be written; raised on every rank together, the older ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """One sealed checkpoint, as its manifest describes it."""

    path: Path
    step: int
    world_size: int
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """Relative path -> `{"size": bytes, "sha256": hex}`."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the loop wants to know before it loads (JSON)."""

    @property
    def tag(self) -> str:
        """Its name."""
        return tag_of(self.step)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def tag_of(step: int) -> str:
    """Name of the checkpoint that is written after `step` steps."""
    return f"step_{step:08d}"


def read(path: Path) -> Checkpoint:
    """Read a manifest and compare the sizes of the files with it.

    Args:
        path: directory of one checkpoint.

    Raises:
        ValueError: with the reason why it cannot be used.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {MANIFEST}: writing it was cut short") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']} is not known to this version (it knows {FORMAT})")
        found = Checkpoint(
            path, int(manifest["step"]), int(manifest["world_size"]), manifest["files"], manifest["info"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is incomplete ({error!r})") from None
    for name, entry in found.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise ValueError(f"{name} is missing") from None
        if size != entry["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {entry['size']}: it was cut short")
    return found


def changed_file(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> str | None:
    """Name of a file whose content is not what was written, or None.

    Args:
        checkpoint: as `read` gave it.
        share: (k, n): look at the k-th of n parts of the files, so that n ranks share the reading.
    """
    for name in sorted(checkpoint.files)[share[0] :: share[1]]:
        try:
            same = _sha256(checkpoint.path / name) == checkpoint.files[name]["sha256"]
        except OSError:
            same = False
        if not same:
            return name
    return None


def find(directory: Path) -> tuple[list[Checkpoint], list[Skipped]]:
    """All checkpoints under `directory`, newest first: those that agree with their manifest, and the others.

    Local to this process and cheap: sizes are compared here, contents by `newest`.

    Args:
        directory: `output_dir/checkpoints`; it need not exist.
    """
    good, bad = [], []
    paths = [path for path in directory.glob("step_*") if path.is_dir() and _TAG.fullmatch(path.name)]
    # killed between the two renames of a replacement
    paths += [path for path in directory.glob(f"{_REPLACED}step_*") if not _home(path).exists()]
    for path in sorted(paths, key=_step, reverse=True):
        try:
            good.append(read(path))
        except ValueError as error:
            bad.append(Skipped(path, str(error)))
    return good, bad


def _home(replaced: Path) -> Path:
    """Where a checkpoint was before it made room for another one of its step."""
    return replaced.with_name(replaced.name.removeprefix(_REPLACED))


def locate(path: Path, where: str = "--resume") -> Path:
    """Directory to look for checkpoints in, for what a user may give: a run, its checkpoints, or one of them.

    Args:
        path: what was given.
        where: the argument, for the message.

    Raises:
        RecipeError: nothing of that kind is there.
    """
    if (path / MANIFEST).is_file() or _TAG.fullmatch(path.name):
        if path.is_dir():
            return path
    elif (path / "checkpoints").is_dir():
        return path / "checkpoints"
    elif path.is_dir() and any(path.glob("step_*")):
        return path
    raise RecipeError(
        "no checkpoint is there",
        where=where,
        got=str(path),
        allowed=("auto, none, " if where == "--resume" else "")
        + "a run's output directory, its checkpoints/ directory, or one checkpoint in it",
    )


def newest(candidates: Sequence[Checkpoint]) -> tuple[Checkpoint | None, list[Skipped]]:
    """The first of the candidates whose files have the content that was written; every rank calls it.

    Args:
        candidates: newest first; rank 0's list counts.
    """
    skipped: list[Skipped] = []
    for candidate in gather_objects(list(candidates))[0]:
        reports = gather_objects(changed_file(candidate, (rank(), world_size())))
        changed = next((name for name in reports if name is not None), None)
        if changed is None:
            return candidate, skipped
        skipped.append(Skipped(candidate.path, f"the content of {changed} is not what was written"))
    return None, skipped


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Args:
        directory: `output_dir/checkpoints`.
        keep_last: so many are kept besides the best one.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def save(
        self,
        engine: Engine,
        step: int,
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        info: Mapping[str, Any] | None = None,
        best_step: int | None = None,
    ) -> Path:
        """Write one checkpoint; every rank calls it.

        Args:
            engine: writes model and optimizer.
            step: steps taken.
            state: the loop's own, the same on all ranks.
            rank_state: what this rank needs besides: tensors, numbers, strings; tuples, lists, dicts of them.
            info: JSON for the manifest.
            best_step: the checkpoint of that step is kept, however old.

        Raises:
            CheckpointError: on every rank when any of them could not write; the older ones are untouched.
        """
        tag = tag_of(step)
        hidden = self.directory / f"{_HIDDEN}{tag}"
        self._agree(self._make_room, hidden, what=tag, on_rank_0=True)
        self._agree(self._write, engine, hidden, state, rank_state, what=tag)
        files = self._agree(_seal_files, hidden, what=tag)
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size(),
            "info": dict(info or {}),
            "files": {name: entry for part in files for name, entry in part.items()},
        }
        self._agree(self._publish, hidden, tag, manifest, what=tag, on_rank_0=True)
        if rank() == 0:
            self._prune(step, best_step)
        barrier()
        return self.directory / tag

    def load(self, engine: Engine, checkpoint: Checkpoint) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Read a checkpoint back; every rank calls it.

        Returns:
            `state` as it was given to `save`, and what it was given as `rank_state`: this rank's own alone where there
            are as many ranks as there were, else those of all ranks that wrote it, in their order.
        """
        state = engine.load_checkpoint(checkpoint.path.parent, checkpoint.path.name)
        same = checkpoint.world_size == world_size()
        ranks = [rank()] if same else range(checkpoint.world_size)
        return state, [
            torch.load(_rank_file(checkpoint.path, one), map_location="cpu", weights_only=True)
            for one in ranks
        ]

    def drop_after(self, step: int) -> None:
        """Remove, on rank 0, what is newer than `step`: a resumed run writes those again."""
        if rank() == 0:
            for path in self.directory.glob("step_*"):
                found = _TAG.fullmatch(path.name)
                if found and int(found[1]) > step:
                    self._remove(path)
            for path in self.directory.glob(f"{_REPLACED}step_*"):
                if _step(path) > step:
                    self._remove(path)
            good, _ = find(self.directory)
            if good:
                write_text(self.directory / LATEST, tag_of(good[0].step))
            else:
                (self.directory / LATEST).unlink(missing_ok=True)
        barrier()

    def _remove(self, path: Path, ignore_errors: bool = False) -> None:
        """Remove a checkpoint: out of sight in one piece first, so that no half of it is ever found."""
        aside = self.directory / f"{_HIDDEN}removed-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
            shutil.rmtree(aside)
        except OSError:
            if not ignore_errors:
                raise

    def _make_room(self, hidden: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for replaced in self.directory.glob(f"{_REPLACED}step_*"):
            if _home(replaced).exists():
                self._remove(replaced)
            else:
                replaced.rename(_home(replaced))
        for leftover in self.directory.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        for aside in self.directory.glob(f".{LATEST}.*"):
            aside.unlink()
        (hidden / "run").mkdir(parents=True)

    def _write(
        self, engine: Engine, hidden: Path, state: Mapping[str, Any], rank_state: Mapping[str, Any]
    ) -> None:
        engine.save_checkpoint(self.directory, hidden.name, state)
        torch.save(dict(rank_state), _rank_file(hidden, rank()))

    def _publish(self, hidden: Path, tag: str, manifest: Mapping[str, Any]) -> None:
        write_json(hidden / MANIFEST, manifest)
        # Names reach the disk with their folder, and an older checkpoint may go as soon as this one is in place.
        for folder in (*(path for path in hidden.rglob("*") if path.is_dir()), hidden):
            _sync_directory(folder)
        final, replaced = self.directory / tag, self.directory / f"{_REPLACED}{tag}"
        if final.exists():  # the same step again, e.g. after a resume: found under its other name meanwhile
            final.rename(replaced)
        hidden.rename(final)
        _sync_directory(self.directory)
        write_text(self.directory / LATEST, tag)
        if replaced.exists():
            self._remove(replaced, ignore_errors=True)

    def _prune(self, step: int, best_step: int | None) -> None:
        good, bad = find(self.directory)
        kept = {checkpoint.path for checkpoint in good[: self.keep_last]}
        kept.add(self.directory / tag_of(step))
        if best_step is not None:
            kept.add(self.directory / tag_of(best_step))
        for path in [*(one.path for one in good), *(one.path for one in bad)]:
            if path not in kept:
                # what cannot be removed today is tried again after the next save
                self._remove(path, ignore_errors=True)

    def _agree(self, action: Any, *arguments: Any, what: str, on_rank_0: bool = False) -> list[Any]:
        """Run `action` on every rank (or on rank 0), gather results, raise on all if one of them failed."""
        result, problem = None, None
        if rank() == 0 or not on_rank_0:
            try:
                result = action(*arguments)
            except OtherRankError:
                pass  # that rank tells it itself
            except Exception as error:
                problem = _words(error, self.directory)
        reports = gather_objects((result, problem))
        problems = [f"rank {who}: {words}" for who, (_, words) in enumerate(reports) if words is not None]
        if problems:
            if rank() == 0:
                for leftover in self.directory.glob(f"{_HIDDEN}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            good, _ = find(self.directory)
            last = f"the last good one is {good[0].path}" if good else "there is no older one"
            raise CheckpointError(
                f"the checkpoint {what} could not be written ({'; '.join(problems)}); {last}",
                where=str(self.directory),
                remedy="make room on the disk (or give another --output_dir), then go on with --resume auto",
            )
        return [result for result, _ in reports]


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one piece: after a crash the old content or the new is there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one piece.

    Raises:
        ValueError: the value holds a number that JSON cannot (NaN, infinity).
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def rng_state() -> dict[str, Any]:
    """State of this process's random number generators (python, numpy, torch, CUDA), fit for `torch.save`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rank_file(directory: Path, who: int) -> Path:
    return directory / "run" / f"rank_{who:05d}.pt"


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _seal_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of this rank's share of the files, flushed to the disk first."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    entries = {}
    for name in names[rank() :: world_size()]:
        path = directory / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _words(error: Exception, directory: Path) -> str:
    """What went wrong, with the room on the disk: torch reports a full one without saying so."""
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        words = f"the disk is full ({error})"
    place = next((one for one in (directory, *directory.parents) if one.exists()), None)
    if place is not None:
        words += f"; {shutil.disk_usage(place).free / 1e6:.1f} MB free"
    return words
