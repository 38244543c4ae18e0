"""What to do with an output directory that is not empty: refuse, go on, or start again.

Everything here happens before a process group exists, on every rank alike, and changes nothing on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsso import checkpoint, seedlog
from dsso.checkpoint import Checkpoint, Skipped
from dsso.engines.portable import describe
from dsso.errors import RecipeError, RunError

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine

OUTPUTS = (
    "config.json",
    "metrics.jsonl",
    seedlog.FILE,
    "summary.json",
    "checkpoints",
    "best",
    "adapter",
    "profile",
)
"""What a run writes; `--overwrite` removes these and nothing else."""
_MUST_AGREE = (
    "optimizer.type",
    "optimizer.params.base.type",
    "scheduler.type",
    "dsso.model.name",
    "dsso.model.init",
    "dsso.model.revision",
    "dsso.peft",
    "dsso.task.head",
)
"""A checkpoint cannot be read when one of these is another."""
_MAY_DIFFER = (
    "dsso.output_dir",
    "dsso.comment",
    "dsso.engine",
    "dsso.train.interface",
    "dsso.train.time_limit_minutes",
    "zero_optimization.stage",
)
"""Of these nothing is said, or what the checkpoint itself tells."""


@dataclass(frozen=True)
class Resume:
    """How a run starts."""

    candidates: tuple[Checkpoint, ...] = ()
    """Newest first; empty: from the beginning."""
    skipped: tuple[Skipped, ...] = ()
    """Checkpoints that cannot be used."""
    remove: tuple[Path, ...] = ()
    """What `--overwrite` removes first."""
    notes: tuple[str, ...] = ()
    """What the user is told at the start."""
    log: Path | None = None
    """Seed log that leads on from the newest checkpoint, or from the beginning."""

    @property
    def run_directory(self) -> Path | None:
        """Output directory of the run that is continued."""
        if self.candidates:
            return self.candidates[0].path.parent.parent
        return None if self.log is None else self.log.parent


def plan(output_dir: Path, resume: str, overwrite: bool) -> Resume:
    """Decide how the run starts.

    Args:
        output_dir: where it will write.
        resume: `none`, `auto` or a path.
        overwrite: `--overwrite`.

    Raises:
        RecipeError: the directory holds another run, or nothing usable is at the path.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise RecipeError("is a file, not a directory", where="output_dir", got=str(output_dir))
    present = tuple(output_dir / name for name in OUTPUTS if (output_dir / name).exists())
    if resume == "none":
        if present and not overwrite:
            raise _holds_another(output_dir, present)
        return Resume(remove=present)
    directory = output_dir / "checkpoints" if resume == "auto" else checkpoint.locate(Path(resume))
    candidates, skipped = _candidates(directory)
    if resume == "auto":
        path = output_dir / seedlog.FILE
        log = path if path.exists() else None
        notes = () if candidates or log or not present else _start_again(output_dir, skipped)
        return Resume(candidates, skipped, notes=notes, log=log)
    if not candidates:
        raise RecipeError(
            "no checkpoint there can be used",
            where="--resume",
            got=resume,
            allowed="; ".join(f"{one.path.name}: {one.reason}" for one in skipped) or None,
        )
    if candidates[0].path.parent.parent.resolve() != output_dir.resolve():
        if present and not overwrite:
            raise _holds_another(output_dir, present)
        return Resume(candidates, skipped, present)
    later = [one for one in checkpoint.find(candidates[0].path.parent)[0] if one.step > candidates[0].step]
    reached = _logged(output_dir / seedlog.FILE)
    if (later or reached > candidates[0].step) and not overwrite:
        newer = f"{later[0].tag} is newer" if later else f"the seed log goes on to step {reached}"
        raise RecipeError(
            f"{newer} and would be removed",
            where="--resume",
            got=resume,
            remedy="--resume auto goes on from the newest, --overwrite removes what came later,"
            " another --output_dir keeps it",
        )
    return Resume(candidates, skipped)


def _logged(path: Path) -> int:
    """Steps that a seed log leads to; 0 where there is none that can be used."""
    try:
        return seedlog.read(path).last if path.exists() else 0
    except RunError:
        return 0


def _candidates(directory: Path) -> tuple[tuple[Checkpoint, ...], tuple[Skipped, ...]]:
    """Usable checkpoints in a directory of checkpoints, or the one that `directory` is."""
    if directory.name == "checkpoints" or not directory.name.startswith("step_"):
        good, bad = checkpoint.find(directory)
        return tuple(good), tuple(bad)
    try:
        return (checkpoint.read(directory),), ()
    except ValueError as error:
        return (), (Skipped(directory, str(error)),)


def _holds_another(output_dir: Path, present: tuple[Path, ...]) -> RecipeError:
    return RecipeError(
        f"holds another run ({', '.join(path.name for path in present)})",
        where="output_dir",
        got=str(output_dir),
        remedy="--resume auto goes on with it, --overwrite starts again in its place,"
        " or give another --output_dir",
    )


def _start_again(output_dir: Path, skipped: tuple[Skipped, ...]) -> tuple[str, ...]:
    which = "no usable checkpoint" if skipped else "no checkpoint"
    return (f"{output_dir} has {which}: starting from the beginning",)


def compare(found: Resume, recipe: Mapping[str, Any]) -> Resume:
    """Compare the recipe with the one that the checkpoint was written with.

    Args:
        found: from `plan`.
        recipe: the resolved recipe as JSON.

    Returns:
        `found` with a note on what has changed.

    Raises:
        RecipeError: the checkpoint cannot be read with this recipe.
    """
    if found.run_directory is None:
        return found
    written = found.candidates[0].path if found.candidates else found.log
    try:
        text = (found.run_directory / "config.json").read_text(encoding="utf-8")
        before = dict(_leaves(json.loads(text)["resolved"]))
    except (OSError, ValueError, KeyError):
        return replace(
            found, notes=(*found.notes, "no config.json beside the checkpoint: recipes not compared")
        )
    changes = []
    notes = []
    now = dict(_leaves(json.loads(json.dumps(recipe))))
    different = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    for must in _MUST_AGREE:  # the broadest first: another optimizer has other parameters as well
        for key in different:
            if key.startswith(must):
                raise RecipeError(
                    f"differs from the run that wrote {written}",
                    where=key,
                    got=now.get(key),
                    allowed=repr(before.get(key)),
                    remedy="resume with the same model, adapters and optimizer, or start a new run",
                )
    for key in different:
        changes.append(f"{key}: {before.get(key)!r} -> {now.get(key)!r}")
    if changes:
        notes.append(f"the recipe has changed since: {'; '.join(changes)}")
    if any(change.startswith("train_batch_size:") for change in changes):
        notes.append(
            "warning: another global batch: from here on other examples are taken in a step than before"
        )
    return replace(found, notes=(*found.notes, *notes))


def moved(start: Checkpoint, engine: Engine) -> str | None:
    """What to tell when a checkpoint goes on in another place than it was written in.

    Args:
        start: the checkpoint.
        engine: the engine that goes on with it.
    """
    before = describe(start.path)
    was = _place(before["world_size"], before["engine"], before["stage"])
    now = _place(engine.world_size, engine.name, engine.stage)
    if was == now:
        return None
    told = f"written by {was}, goes on with {now}"
    if before["world_size"] != engine.world_size:
        told += ": to rounding; random numbers (dropout) begin anew"
    return told


def _place(ranks: int, engine: str, stage: int | None) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''} ({engine if stage is None else f'ZeRO {stage}'})"


def _leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
