"""How long must curvature be renewed, and what damping does a batch want? Two rules of a poster, on MRPC and STS-B.

    DSSO_DATA=... python tests/bench/curvature_rules.py --out runs/rules    # again: only what is missing

A small network learns from fixed features of MiniLM (`pair_features.py`, `pair_runs.py`), 10 passes over the data.

Early curvature: K-FAC and Shampoo at batch 32, curvature renewed at every step up to a share of the run and never
after it; 0 is the curvature of the first batch alone, 1 that of every batch.

Damping: K-FAC at four batches, with `damping` over six decades; all else, the clip of the Newton step among it, as
by default, with curvature renewed at each of the first 10 steps and at every 10th from then on.

The learning rate is tuned for every row by itself, by the training loss over all examples at the end of a run with
seed 0, over five rates half a decade apart and further while the best is at the end (four times at most). What is
shown is that loss of three other seeds. A finished run is not repeated, so the script can be stopped at any time.

The rules are 2 and 3 of the summary of Ishikawa and Yokota 2024 (table 1, figure 5).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import pair_features  # noqa: E402
import pair_runs  # noqa: E402
import results_file  # noqa: E402
from pair_runs import FULL, Case, Run, words  # noqa: E402

from dsso.results import text_table  # noqa: E402

SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of a run, from its first step on, that curvature is renewed in."""
EARLY_BATCH = 32
INTERVALS = {"KFAC": ("factor_interval", "inverse_interval"), "Shampoo": ("refresh_interval",)}
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1)
BATCHES = (32, 128, 512, FULL)
OFTEN = [[0, 1], [10, 10]]
CENTRES = {"KFAC": 1e-1, "Shampoo": 1e-3}
"""Learning rates that the grids begin around."""


@dataclass(frozen=True)
class Row:
    """A question to be asked: a case, and the value of what is varied."""

    rule: str
    value: float
    case: Case


def until(share: float, steps: int) -> list[list[int | None]]:
    """Interval of 1 in that share of the steps, then never again; the first step always renews."""
    last = max(1, round(share * steps))
    return [[0, 1]] if last >= steps else [[0, 1], [last, None]]


def rows(task: str, examples: int, batches: Sequence[int], shared: dict[str, Any]) -> list[Row]:
    """All of a task with so many training examples; `shared`: settings of every case."""
    found = []
    size = min(EARLY_BATCH, examples)
    steps = shared["epochs"] * (examples // size)
    for method, names in INTERVALS.items():
        for share in SHARES:
            settings = dict.fromkeys(names, until(share, steps))
            case = Case(task, method, size, settings, CENTRES[method], **shared)
            found.append(Row("early", share, case))
    for batch in batches:
        for damping in DAMPINGS:
            settings = {"damping": damping, **dict.fromkeys(INTERVALS["KFAC"], OFTEN)}
            case = Case(task, "KFAC", batch, settings, CENTRES["KFAC"], **shared)
            found.append(Row("damping", damping, case))
    return found


def answer(row: Row, run: Run) -> dict[str, Any]:
    """Of three seeds at the row's own rate."""
    found = pair_runs.tuned(row.case, run, "train_loss", "train_loss")
    case = row.case
    place = {"rule": row.rule, "task": case.task, "method": case.method, "batch": case.batch}
    return {**place, "value": row.value, **found}


# -- what is shown -----------------------------------------------------------------------------------------------


def table(answers: Sequence[dict[str, Any]], rule: str, varied: str) -> str:
    """A row an answer."""
    heads = ["task", "method", "batch", "steps", varied, "lr", "training loss (of the seeds)"]
    lines = [
        [
            *(one["task"], one["method"], words(one["batch"]), str(one["steps"]), f"{one['value']:g}"),
            f"{one['lr']:g}" + ("" if one["inside"] else " (end of the grid)"),
            f"{fmean(one['values']):.4f} ({min(one['values']):.4f} .. {max(one['values']):.4f})",
        ]
        for one in answers
        if one["rule"] == rule
    ]
    return text_table([heads, *lines])


def courses(answers: Sequence[dict[str, Any]], rule: str) -> dict[str, list[dict[str, Any]]]:
    """Answers of a rule by what they are compared within: `task/method`, or `task/batch` of a damping."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in answers:
        if one["rule"] == rule:
            within = one["method"] if rule == "early" else words(one["batch"])
            found.setdefault(f"{one['task']}/{within}", []).append(one)
    return found


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By rule and course: the mean loss at every value, and of dampings the best."""
    found: dict[str, Any] = {}
    for rule in ("early", "damping"):
        losses = {
            name: {f"{one['value']:g}": results_file.finite(fmean(one["values"])) for one in course}
            for name, course in courses(answers, rule).items()
        }
        found[rule] = losses
    found["best_damping"] = {
        name: float(min(course, key=lambda value: course[value] if course[value] is not None else math.inf))
        for name, course in found["damping"].items()
    }
    return found


def draw(answers: Sequence[dict[str, Any]], file: Path) -> None:
    """A row a task: loss against the share of the run, and against the damping; the range of the seeds as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(one["task"] for one in answers))
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 3.3 * len(tasks)), dpi=100, layout="constrained")
        axes = figure.subplots(len(tasks), 2, squeeze=False)
        for task, (early, damping) in zip(tasks, axes, strict=True):
            own = [one for one in answers if one["task"] == task]
            _courses(early, own, "early", f"{task}: curvature renewed in the first share of the run", "share")
            early.set_xticks(range(len(SHARES)), [f"{share:g}" for share in SHARES])
            _courses(damping, own, "damping", f"{task}: damping of K-FAC", "damping")
            damping.set_xticks(range(len(DAMPINGS)), [f"{one:g}" for one in DAMPINGS])
            for axis in (early, damping):
                axis.set_ylabel("training loss")
                axis.grid(alpha=0.3)
                axis.legend(frameon=False, title=None if axis is early else "batch")
        figure.savefig(file)


def _courses(axis: Any, answers: Sequence[dict[str, Any]], rule: str, title: str, label: str) -> None:
    for index, (name, course) in enumerate(courses(answers, rule).items()):
        seeds = [one["values"] for one in course]
        pair_runs.bars(axis, range(len(course)), seeds, name.partition("/")[2], index)
    axis.set_title(title, loc="left", fontsize=9.5)
    axis.set_xlabel(label)


def report(answers: Sequence[dict[str, Any]], picture: Path) -> dict[str, Any]:
    """Tables, figure and the last line."""
    print(table(answers, "early", "share"))
    print()
    print(table(answers, "damping", "damping"))
    draw(answers, picture)
    print(f"figure: {picture}")
    last = summary(answers)
    print(json.dumps(last))
    return last


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then print the tables, draw the figure and print the summary."""
    args = pair_runs.arguments(__doc__, argv)
    if args is None:
        return {}
    shared = {"epochs": args.epochs, "model": args.model, "limit": args.limit}
    asked = [
        row
        for task in args.tasks
        for row in rows(
            task,
            len(pair_features.load(task, args.model, args.out, args.limit).labels["train"]),
            args.batches or BATCHES,
            shared,
        )
    ]
    answers = pair_runs.all_of(asked, answer, args.out / "runs.jsonl", args.jobs)
    return report(answers, args.out / "curvature_rules.png")


if __name__ == "__main__":
    main()
