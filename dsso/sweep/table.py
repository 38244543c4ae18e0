"""A sweep in a table: a row for every setting, medians and ranges over its seeds, the best row first.

A seed that diverged counts as the worst there is: where the middle of the seeds is one, the setting has no median.
Seeds that failed, or have not ended, count for nothing but the column that says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

from dsso.errors import RecipeError
from dsso.results import Run
from dsso.sweep.format import short_names
from dsso.sweep.record import Ending, State, directory, ending, read_point, recorded

LOSS = "train_loss"
"""Metric that is the last logged training loss of a run, beside those of the validation set."""


@dataclass(frozen=True)
class Seed:
    """One run of a setting."""

    name: str
    seed: int | None
    ending: Ending
    metric: float
    """Best value on the validation set; NaN where there is none."""
    test: float
    """The same metric on the test set, of the weights that were best on the validation set; NaN where there is none."""
    train_loss: float
    """The last logged one; NaN where there is none."""
    steps_to_target: float
    """First logged step whose loss is at the target; infinite where none was."""
    seconds: float
    """Of the run, without its start and its end; NaN before it is finished."""


@dataclass(frozen=True)
class Spread:
    """Of the seeds of a setting."""

    median: float | None
    """None: no seed has ended, or the middle one diverged."""
    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        """Median with the range, `0.81 (0.79..0.84)`."""
        middle = number(self.median)
        if self.low is None or self.high is None or self.low == self.high:
            return middle
        return f"{middle} ({number(self.low)}..{number(self.high)})"


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    values: dict[str, Any]
    seeds: list[Seed]
    metric: Spread
    test: Spread
    train_loss: Spread
    steps_to_target: float | None
    """Median; None where the middle seed never came to the target, or there is no target."""
    seconds: float | None
    """Median over finished runs."""

    @property
    def ended(self) -> str:
        """How the runs ended, `2 finished, 1 diverged`."""
        count = Counter(one.ending.state for one in self.seeds)
        return ", ".join(f"{count[state]} {state}" for state in get_args(State) if count[state])


@dataclass(frozen=True)
class Table:
    """All rows, the best first."""

    variables: list[str]
    """Paths that differ between settings."""
    drawn: list[str]
    """Those of them whose values are drawn."""
    metric: str
    target_loss: float | None
    settings: list[Setting]
    problems: list[str] = field(default_factory=list)
    """What is to be said about single runs."""

    @property
    def larger_is_better(self) -> bool:
        """Of the metric."""
        return self.metric not in (LOSS, "loss")

    @property
    def title(self) -> str:
        """Of the metric."""
        return "training loss at the end" if self.metric == LOSS else f"best validation {self.metric}"

    def rows(self) -> list[list[str]]:
        """As text, the heading first."""
        names = short_names(self.variables)
        heading = [*(names[path] for path in self.variables)] or ["setting"]
        if self.metric != LOSS:
            heading.append(f"best val. {self.metric}")
        tested = any(one.test.high is not None for one in self.settings)
        if tested:
            heading.append(f"test {self.metric}")
        heading.append("train loss")
        if self.target_loss is not None:
            heading.append(f"steps to {self.target_loss:g}")
        table = [[*heading, "seconds", "seeds", "ended"]]
        for one in self.settings:
            row = [shown(one.values[path]) for path in self.variables] or ["the recipe"]
            if self.metric != LOSS:
                row.append(one.metric.text())
            if tested:
                row.append(one.test.text())
            row.append(one.train_loss.text())
            if self.target_loss is not None:
                row.append("-" if one.steps_to_target is None else f"{one.steps_to_target:g}")
            table.append([*row, number(one.seconds), str(len(one.seeds)), one.ended])
        return table

    def to_json(self) -> dict[str, Any]:
        """For programs; what is not known is null."""
        return {
            "variables": self.variables,
            "metric": self.metric,
            "larger_is_better": self.larger_is_better,
            "target_loss": self.target_loss,
            "settings": [
                {
                    "values": one.values,
                    "metric": vars(one.metric),
                    "test": vars(one.test),
                    "train_loss": vars(one.train_loss),
                    "steps_to_target": one.steps_to_target,
                    "seconds": one.seconds,
                    "runs": [
                        {
                            "name": run.name,
                            "seed": run.seed,
                            **vars(run.ending),
                            "metric": _known(run.metric),
                            "test": _known(run.test),
                            "train_loss": _known(run.train_loss),
                            "steps_to_target": _known(run.steps_to_target),
                            "seconds": _known(run.seconds),
                        }
                        for run in one.seeds
                    ],
                }
                for one in self.settings
            ],
            "problems": self.problems,
        }


def read_table(out: Path, metric: str | None = None, target_loss: float | None = None) -> Table:
    """Read all runs of a sweep.

    Args:
        out: directory of the sweep.
        metric: of the validation set, or `train_loss`; None: the task's main one.
        target_loss: training loss that steps are counted to.

    Raises:
        RecipeError: the directory is not that of a sweep, or no run has such a metric.
    """
    kept = recorded(out)
    problems: list[str] = []
    damaged: set[str] = set()
    runs: dict[str, Run | None] = {}
    for one in kept.points:
        try:
            runs[one["name"]] = read_point(directory(out, one["name"]))
        except RecipeError as error:
            runs[one["name"]] = None
            damaged.add(one["name"])
            problems.append(f"{one['name']}: left out: {' '.join(str(error).split())}")
    seen = [run for run in runs.values() if run is not None]
    metric = _metric(metric, seen)
    problems += [text for run in seen for text in run.warnings]
    groups: dict[str, list[Seed]] = {}
    values: dict[str, dict[str, Any]] = {}
    for one in kept.points:
        name = one["name"]
        how = Ending("failed") if name in damaged else ending(directory(out, name))
        if how.reason:
            problems.append(f"{name}: {how.state}: {how.reason}")
        key = json.dumps(one["values"], sort_keys=True)
        values[key] = one["values"]
        groups.setdefault(key, []).append(_seed(name, one["seed"], how, runs[name], metric, target_loss))
    random = kept.file.random
    table = Table(
        kept.file.variables,
        list(random.space) if random else [],
        metric,
        target_loss,
        [_setting(values[key], seeds, metric) for key, seeds in groups.items()],
        problems,
    )
    table.settings.sort(key=lambda one: _rank(one, table.larger_is_better))
    return table


def _metric(asked: str | None, runs: Sequence[Run]) -> str:
    known = {
        name
        for run in runs
        for line in run.evaluations
        if line.get("split") == "validation"
        for name in line["metrics"]
    }
    if asked is None:
        return next((name for run in runs if (name := run.metric())), LOSS)
    if asked != LOSS and known and asked not in known:
        raise RecipeError(
            "no run has such a metric", where="--metric", got=asked, allowed=[*sorted(known), LOSS]
        )
    return asked


def _seed(
    name: str, seed: int | None, how: Ending, run: Run | None, metric: str, target: float | None
) -> Seed:
    nothing = math.nan
    if run is None:
        return Seed(name, seed, how, nothing, nothing, nothing, math.inf, nothing)
    steps, losses = run.curve("loss")
    last = next((loss for loss in reversed(losses) if not math.isnan(loss)), nothing)
    found = [
        value
        for line in run.evaluations
        if line.get("split") == "validation" and math.isfinite(value := _float(line["metrics"].get(metric)))
    ]
    best = (min if metric == "loss" else max)(found, default=nothing)
    reached = math.inf
    if target is not None:
        reached = next((step for step, loss in zip(steps, losses, strict=True) if loss <= target), math.inf)
    return Seed(
        name,
        seed,
        how,
        last if metric == LOSS else best,
        _float(tested.get(metric)) if isinstance(tested := run.summary.get("test"), dict) else nothing,
        last,
        reached,
        _float(run.summary.get("wall_seconds")),
    )


def _setting(values: dict[str, Any], seeds: list[Seed], metric: str) -> Setting:
    ended = [one for one in seeds if one.ending.final]
    steps = [math.inf if one.ending.state == "diverged" else one.steps_to_target for one in ended]
    middle = median(steps) if steps else math.inf
    seconds = [one.seconds for one in ended if not math.isnan(one.seconds)]
    worst = math.inf if metric in (LOSS, "loss") else -math.inf
    return Setting(
        values,
        seeds,
        _spread(ended, lambda one: one.metric, worst),
        _spread(ended, lambda one: one.test, worst),
        _spread(ended, lambda one: one.train_loss, math.inf),
        middle if math.isfinite(middle) else None,
        median(seconds) if seconds else None,
    )


def _spread(seeds: Sequence[Seed], value: Callable[[Seed], float], worst: float) -> Spread:
    finite = [value(one) for one in seeds if one.ending.state == "finished" and math.isfinite(value(one))]
    every = [*finite, *([worst] * (len(seeds) - len(finite)))]
    middle = median(every) if every else worst
    return Spread(
        middle if math.isfinite(middle) else None,
        min(finite, default=None),
        max(finite, default=None),
    )


def _rank(one: Setting, larger: bool) -> tuple[bool, float, float]:
    """Best first; equal metrics by the training loss; settings without a median last."""
    value = one.metric.median
    loss = math.inf if one.train_loss.median is None else one.train_loss.median
    if value is None:
        return True, -sum(run.ending.final for run in one.seeds), loss
    return False, -value if larger else value, loss


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def number(value: float | None) -> str:
    """Four digits; `-` for what is not known."""
    return "-" if value is None else f"{value:.4g}"


def shown(value: object) -> str:
    """A value of a recipe in a table or at an axis."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
