"""Does curvature pay at large batches? K-FAC and Shampoo against AdamW at batch 8, 128 and all, on MRPC and STS-B.

    DSSO_DATA=... python tests/bench/batch_sizes.py --out runs/batches     # again: only what is missing

A small network learns from fixed features of MiniLM (`pair_features.py`), 10 passes over the training data whatever
the batch: 10 steps with all of it, thousands with 8 examples. Every method has its defaults (K-FAC's clip of the
Newton step among them), the same warm-up and linear decay of the learning rate, and curvature that is renewed at each
of the first 10 steps and at every 10th from then on.

Learning rates are tuned alike, for each task, method and batch by itself, and twice: for the training loss over all
examples and for the validation loss, after the last step of a run with seed 0. A grid has five rates, half a decade
apart, and grows until the best is not at its end (four times at most); a loss that is not finite is the worst. What
is shown are three other seeds: the training loss at the rate that was best for it, and the score on the test split
(accuracy, Pearson's correlation) at the rate that was best for validation. A finished run is not repeated, so the
script can be stopped at any time.

The claim is that of Ishikawa and Yokota 2024, figure 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import pair_runs  # noqa: E402
import results_file  # noqa: E402
from pair_runs import FULL, Case, Run, words  # noqa: E402

from dsso.results import text_table  # noqa: E402

BATCHES = (8, 128, FULL)
EARLY = [[0, 1], [10, 10]]
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "KFAC": {"factor_interval": EARLY, "inverse_interval": EARLY},
    "Shampoo": {"refresh_interval": EARLY},
}
CENTRES = {"AdamW": 1e-3, "KFAC": 1e-1, "Shampoo": 1e-3}
"""Learning rates that the grids begin around."""


def cell(first: Case, run: Run) -> dict[str, Any]:
    """A place of the table: for both measures the rate, whether it is inside its grid, and the values of the seeds."""
    train = pair_runs.tuned(first, run, "train_loss", "train_loss")
    test = pair_runs.tuned(first, run, "validation_loss", "test_score")
    place = {"task": first.task, "method": first.method, "batch": first.batch, "steps": train["steps"]}
    return {**place, "train_loss": train, "test_score": test}


def words_of(found: dict[str, Any], digits: int) -> list[str]:
    """Rate, mean and range of a measure."""
    values = found["values"]
    return [
        f"{found['lr']:g}" + ("" if found["inside"] else " (end of the grid)"),
        f"{fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})",
    ]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A row a cell."""
    heads = [
        "task",
        "batch",
        "steps",
        "method",
        "lr",
        "training loss (of the seeds)",
        "lr",
        "test score (of the seeds)",
    ]
    rows = [
        [
            *(one["task"], words(one["batch"]), str(one["steps"]), one["method"]),
            *words_of(one["train_loss"], 4),
            *words_of(one["test_score"], 3),
        ]
        for one in cells
    ]
    return text_table([heads, *rows])


def draw(cells: Sequence[dict[str, Any]], file: Path) -> None:
    """A row a task: training loss and test score against the batch, the range of the seeds as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["task"] for one in cells))
    batches = list(dict.fromkeys(one["batch"] for one in cells))
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 3.3 * len(names)), dpi=100, layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False)
        for task, pair in zip(names, axes, strict=True):
            for axis, key, title in zip(
                pair, ("train_loss", "test_score"), ("training loss", "test score"), strict=True
            ):
                for index in range(len(METHODS)):
                    _course(axis, cells, task, key, index, batches)
                axis.set_title(f"{task}: {title}", loc="left", fontsize=9.5)
                axis.set_xticks(range(len(batches)), [words(batch) for batch in batches])
                axis.set_xlabel("examples a step")
                axis.grid(alpha=0.3)
        for row in axes:
            row[0].set_yscale("log")
        axes[0][0].legend(frameon=False)
        figure.savefig(file)


def _course(
    axis: Any, cells: Sequence[dict[str, Any]], task: str, key: str, index: int, batches: list[int]
) -> None:
    """A method's means over the batches, the ranges of its seeds as bars."""
    method = list(METHODS)[index]
    own = [one for one in cells if (one["task"], one["method"]) == (task, method)]
    # side by side, so that bars of equal height do not hide each other
    place = [batches.index(one["batch"]) + 0.08 * (index - 1) for one in own]
    pair_runs.bars(axis, place, [one[key]["values"] for one in own], method, index)


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task and batch: training loss and test score of each method, means over the seeds."""
    found: dict[str, Any] = {}
    for one in cells:
        place = found.setdefault(f"{one['task']}/{words(one['batch'])}", {})
        place[one["method"]] = {
            "train_loss": results_file.finite(fmean(one["train_loss"]["values"])),
            "test_score": round(fmean(one["test_score"]["values"]), 4),
        }
    return found


def report(cells: Sequence[dict[str, Any]], picture: Path) -> dict[str, Any]:
    """Table, figure and the last line."""
    print(table(cells))
    draw(cells, picture)
    print(f"figure: {picture}")
    last = summary(cells)
    print(json.dumps(last))
    return last


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then print the table, draw the figure and print the summary."""
    args = pair_runs.arguments(__doc__, argv)
    if args is None:
        return {}
    firsts = [
        Case(
            *(task, method, batch, METHODS[method], CENTRES[method]),
            epochs=args.epochs,
            model=args.model,
            limit=args.limit,
        )
        for task in args.tasks
        for batch in args.batches or BATCHES
        for method in METHODS
    ]
    cells = pair_runs.all_of(firsts, cell, args.out / "runs.jsonl", args.jobs)
    return report(cells, args.out / "batch_sizes.png")


if __name__ == "__main__":
    main()
