"""What a sweep keeps on the disk, and how each of its runs has ended.

`DIR/sweep.json` is the sweep file with its points. `DIR/points/NAME/` is the output directory of a run, in which
`recipe.json` is what it runs, `point.json` how it ended, `run.log` what it said.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dsso.checkpoint import write_json
from dsso.config import parse
from dsso.errors import RecipeError
from dsso.recipe import read_json
from dsso.results import Run, read_run
from dsso.sweep.format import Diverged, SweepFile
from dsso.sweep.points import Point

State = Literal["finished", "diverged", "failed", "stopped", "started", "missing"]
"""`stopped` by a signal; `started`: under way, or killed with the sweep; `missing`: not begun."""
LOG = "run.log"
_SILENT = ("dsso.comment", "dsso.output_dir")
_TOLD = 5


@dataclass(frozen=True)
class Ending:
    """How a point has ended, so far."""

    state: State
    reason: str = ""
    """Of one that diverged, failed or was stopped."""
    status: int | None = None
    """Exit status of its last run."""

    @property
    def final(self) -> bool:
        """Whether the point is not run again."""
        return self.state in ("finished", "diverged")


def directory(out: Path, name: str) -> Path:
    """The output directory of a point."""
    return out / "points" / name


def ending(folder: Path) -> Ending:
    """How the point in a directory has ended.

    Raises:
        RecipeError: `point.json` is not one of a sweep.
    """
    path = folder / "point.json"
    if not path.exists():
        return Ending("missing")
    found = read_json(path)
    if found.get("state") not in get_args(State):
        raise RecipeError(
            "is not the state of a point", where=str(path), got=found.get("state"), allowed=get_args(State)
        )
    known = Ending(found["state"], str(found.get("reason", "")), found.get("status"))
    if known.state != "diverged" and (folder / "summary.json").exists():
        return Ending("finished", status=known.status)
    return known


def write_ending(folder: Path, point: Point, found: Ending) -> None:
    """Record how a point has ended; the recipe is recorded with it when it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    if found.state == "started":
        write_json(folder / "recipe.json", point.recipe)
    about = {"state": found.state, "reason": found.reason, "status": found.status}
    write_json(folder / "point.json", {**about, "values": point.values, "seed": point.seed})


def open_directory(out: Path, source: Path, sweep: SweepFile, points: Sequence[Point]) -> None:
    """Write `sweep.json`, unless what is there belongs to another sweep.

    Args:
        out: directory of the sweep.
        source: the sweep file.
        sweep: its content.
        points: its points.

    Raises:
        RecipeError: points that have been started are others now, or the directory cannot be written.
    """
    agree(out, points)
    kept = {
        "source": str(source),
        "file": sweep.model_dump(mode="json"),
        "points": [
            {"index": one.index, "name": one.name, "values": one.values, "seed": one.seed} for one in points
        ],
    }
    path = out / "sweep.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "points").mkdir(exist_ok=True)
        # Tasks of an array come here at the same time, with the same content.
        if not path.exists() or read_json(path) != kept:
            write_json(path, kept)
        if not os.access(out / "points", os.W_OK | os.X_OK):
            raise PermissionError("no permission to write in points/")
    except OSError as error:
        raise RecipeError(
            f"cannot be written ({error.strerror or error})",
            where="--out",
            got=str(out),
            remedy="give a directory that can be made, or written in",
        ) from None


def agree(out: Path, points: Sequence[Point]) -> None:
    """Refuse a directory in which points have been started that are others now.

    Args:
        out: directory of the sweep; it need not exist.
        points: of the sweep file.

    Raises:
        RecipeError: which points, and what differs.
    """
    now = {point.name: point.recipe for point in points}
    problems = []
    for folder in _started(out):
        if folder.name not in now:
            problems.append(f"{folder.name}: is not in the sweep file any more")
            continue
        before = dict(_leaves(read_json(folder / "recipe.json")))
        after = dict(_leaves(now[folder.name]))
        changed = [
            f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
            for key in sorted(before.keys() | after.keys())
            if key not in _SILENT and _shown(before, key) != _shown(after, key)
        ]
        if changed:
            problems.append(f"{folder.name}: {'; '.join(changed)}")
    if not problems:
        return
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    raise RecipeError(
        "\n  ".join(["points there have been started with other settings", *problems[:_TOLD], *more]),
        where="--out",
        got=str(out),
        remedy="give another --out, or remove the directories of these points",
    )


def _started(out: Path) -> list[Path]:
    home = out / "points"
    if not home.is_dir():
        return []
    return sorted(one for one in home.iterdir() if (one / "recipe.json").is_file())


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shown(leaves: Mapping[str, object], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "nothing"


@dataclass(frozen=True)
class Recorded:
    """`sweep.json`, read back."""

    file: SweepFile
    source: str
    points: list[dict[str, Any]]
    """`index`, `name`, `values` and `seed` of each."""


def recorded(out: Path) -> Recorded:
    """Read `sweep.json`.

    Raises:
        RecipeError: the directory is not that of a sweep.
    """
    path = out / "sweep.json"
    if not path.is_file():
        raise RecipeError(
            "holds no sweep.json, so it is not the directory of a sweep",
            where=str(out),
            remedy="name the directory that was given as --out",
        )
    found = read_json(path)
    points = found.get("points")
    if not isinstance(points, list) or not all(
        isinstance(one, dict) and {"index", "name", "values", "seed"} <= one.keys() for one in points
    ):
        raise RecipeError(
            "is not what a sweep writes", where=str(path), remedy="remove the file and run again"
        )
    return Recorded(parse(SweepFile, found.get("file"), str(path)), str(found.get("source")), points)


def read_point(folder: Path) -> Run | None:
    """What a point's run has written; None before its first logged step."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    try:
        return read_run(folder)
    except RecipeError as error:
        if "holds no line yet" in str(error):
            return None
        raise


def why_diverged(folder: Path, rule: Diverged | None) -> str:
    """Why a run counts as diverged by its log; empty where it does not.

    Args:
        folder: the run's output directory.
        rule: of the sweep file; None: nothing diverges.

    Raises:
        RecipeError: the log cannot be read.
    """
    run = None if rule is None else read_point(folder)
    if rule is None or run is None:
        return ""
    first: float | None = None
    row = 0
    for step, loss in zip(*run.curve("loss"), strict=True):
        if first is None and math.isfinite(loss):
            first = loss
        reason = _too_high(loss, first, rule) if step > rule.after else ""
        row = row + 1 if reason else 0
        if row >= rule.in_a_row:
            return f"step {step:.0f}: {reason}"
    return ""


def _too_high(loss: float, first: float | None, rule: Diverged) -> str:
    if not math.isfinite(loss):
        return "the loss is not finite"
    if rule.loss is not None and loss > rule.loss:
        return f"loss {loss:.4g} is above {rule.loss:g}"
    if rule.factor is not None and first is not None and loss > rule.factor * first > 0:
        return f"loss {loss:.4g} is above {rule.factor:g} times the first one, {first:.4g}"
    return ""
