"""What a run has written, read back: logged steps, evaluations, the summary, and a table of several runs.

`metrics.jsonl` has a line for every logged step (`step`, `loss`, `lr`, `seconds` and what the method
reports) and a line with `eval` (`split`, `step`, `metrics`) for every evaluation; `config.json` and
`summary.json` are read where they exist already, so a run under way can be looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsso.errors import RecipeError

Points = tuple[list[float], list[float]]
"""Abscissae and ordinates of a curve."""


@dataclass
class Run:
    """What one run has written so far."""

    directory: Path
    steps: list[dict[str, Any]]
    """Lines of logged steps, in order."""
    evaluations: list[dict[str, Any]]
    """`{split, step, metrics}` of each evaluation, in order."""
    summary: dict[str, Any]
    """Content of `summary.json`; empty while the run is under way."""
    config: dict[str, Any]
    """Content of `config.json`; empty where there is none."""
    warnings: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, `?` when neither file tells it."""
        for place in (self.summary, self.config, self.config.get("recipe"), self.config.get("resolved")):
            if isinstance(place, dict):
                found = place.get("optimizer")
                found = found.get("type") if isinstance(found, dict) else found
                if isinstance(found, str):
                    return found
        return "?"

    def curve(self, key: str, against: str = "step") -> Points:
        """Values of `key` against `step` or `seconds`; lines without the key are left out.

        A value that is no finite number stays in the curve as NaN, so that a gap is seen.
        """
        pairs = [(line[against], line[key]) for line in self.steps if key in line and against in line]
        return [_number(x) for x, _ in pairs], [_number(y) for _, y in pairs]

    def clip_rate(self) -> Points:
        """Share of clipped steps in about 20 windows, from the running count `clip_events`."""
        points = [(0.0, 0.0), *zip(*self.curve("clip_events"), strict=True)]
        if len(points) == 1:
            return [], []
        # few wide windows: the share within a handful of steps says little
        stride = max(1, (len(points) - 1) // 20)
        points = [*points[:-1:stride], points[-1]]
        spans = [(since, to) for since, to in pairwise(points) if to[0] > since[0]]
        rates = [(to[1] - since[1]) / (to[0] - since[0]) for since, to in spans]
        # each value belongs to the steps before its end; the first one is repeated where its window starts
        shares = [min(max(rate, 0.0), 1.0) for rate in rates]
        return [0.0, *(to[0] for _, to in spans)], [*shares[:1], *shares]

    def metric(self) -> str | None:
        """Name of the main validation metric."""
        named = self.summary.get("main_metric") or self.summary.get("metric")
        if isinstance(named, str):
            return named
        for one in self.evaluations:
            if one.get("split") == "validation":
                names = [name for name in one["metrics"] if name != "loss"]
                return names[0] if names else "loss"
        return None

    def validation(self) -> Points:
        """The main validation metric against the step."""
        name = self.metric()
        pairs = [
            (one["step"], one["metrics"][name])
            for one in self.evaluations
            if one.get("split") == "validation" and name in one["metrics"]
        ]
        return [_number(x) for x, _ in pairs], [_number(y) for _, y in pairs]


def _number(value: object) -> float:
    """A finite float, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def read_run(directory: str | Path) -> Run:
    """Read the files of a run.

    A last line that is cut short (the run is writing it, or was killed) is left out with a warning in
    `Run.warnings`; anything else that cannot be read is an error.

    Raises:
        RecipeError: the directory or its `metrics.jsonl` is missing, empty or not that of a run.
    """
    folder = Path(directory)
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise RecipeError(
            "no such directory",
            where=str(folder),
            remedy="name the output directory of a run, e.g. runs/quickstart/kfac",
        )
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if (child / "metrics.jsonl").is_file())
        raise RecipeError(
            "holds no metrics.jsonl, so it is not the directory of a run",
            where=str(folder),
            remedy=f"did you mean {', '.join(str(folder / name) for name in inside[:5])}?"
            if inside
            else "name the output directory of a run",
        )
    run = Run(folder, [], [], _json(folder / "summary.json"), _json(folder / "config.json"))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                run.warnings.append(f"{path} line {number}: cut short, left out")
                continue
            raise RecipeError(
                f"is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})",
                where=f"{path} line {number}",
                got=text[:80],
                remedy="remove the line",
            ) from None
        if not isinstance(line, dict) or not ("eval" in line or "step" in line):
            raise RecipeError(
                "is not a line of a run",
                where=f"{path} line {number}",
                got=text[:80],
                allowed='an object with "step", or with "eval"',
            )
        _sort_in(run, line, f"{path} line {number}")
    if not run.steps and not run.evaluations:
        raise RecipeError(
            "holds no line yet", where=str(path), remedy="wait for the first logged step of the run"
        )
    return run


def _sort_in(run: Run, line: dict[str, Any], where: str) -> None:
    evaluation = line.get("eval")
    if evaluation is None:
        run.steps.append(line)
    elif isinstance(evaluation, dict) and isinstance(evaluation.get("metrics"), dict):
        run.evaluations.append({"step": line.get("step"), **evaluation})
    else:
        raise RecipeError(
            "is not an evaluation", where=where, got=evaluation, allowed='{"split", "step", "metrics"}'
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"is not JSON ({error.msg})",
            where=f"{path}:{error.lineno}:{error.colno}",
            remedy="remove the file; the curves can be drawn without it",
        ) from None
    if not isinstance(value, dict):
        raise RecipeError("must be an object", where=str(path), got=value)
    return value


def name_runs(runs: Sequence[Run]) -> None:
    """Give every run a label: its optimizer, and its directory where that alone does not tell runs apart."""
    optimizers = [run.optimizer for run in runs]
    folders = [run.directory.resolve() for run in runs]
    for run, optimizer, folder in zip(runs, optimizers, folders, strict=True):
        if optimizer != "?" and optimizers.count(optimizer) == 1:
            run.label = optimizer
            continue
        depth = 1
        while depth < len(folder.parts) and any(
            other != folder and other.parts[-depth:] == folder.parts[-depth:] for other in folders
        ):
            depth += 1
        name = "/".join(folder.parts[-depth:])
        # the optimizer goes without saying where it is the same everywhere
        run.label = name if len(set(optimizers)) == 1 else f"{optimizer} ({name})"


_COLUMNS: tuple[tuple[str, str], ...] = (
    ("steps", "steps"),
    ("best_metric", "best val."),
    ("test_metric", "test"),
    ("train_loss", "train loss"),
    ("wall_seconds", "seconds"),
)


def _cell(value: object) -> str:
    if isinstance(value, dict):  # {"name": …, "value": …} or {metric: value}
        value = value.get("value", next(iter(value.values()), None))
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table of the finished runs, the heading first; only the heading when none is finished."""
    metric = next((name for run in runs if (name := run.metric())), "metric")
    heading = [f"{text} {metric}" if key.endswith("_metric") else text for key, text in _COLUMNS]
    table = [["optimizer", *heading]]
    table += [
        [run.label, *(_cell(run.summary.get(key)) for key, _ in _COLUMNS)] for run in runs if run.summary
    ]
    return table


def text_table(table: Sequence[Sequence[str]]) -> str:
    """The table in plain text, numbers aligned on the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
