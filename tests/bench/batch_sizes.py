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

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import pair_features  # noqa: E402
import results_file  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dsso.engines import make_optimizer  # noqa: E402
from dsso.engines.single import SingleEngine  # noqa: E402
from dsso.optim import resolve  # noqa: E402
from dsso.plots import COLOURS, STYLES  # noqa: E402
from dsso.recipe_models import BASELINES  # noqa: E402
from dsso.results import text_table  # noqa: E402

FULL = 0
"""Batch of all training examples."""
BATCHES = (8, 128, FULL)
EARLY = [[0, 1], [10, 10]]
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "KFAC": {"factor_interval": EARLY, "inverse_interval": EARLY},
    "Shampoo": {"refresh_interval": EARLY},
}
CENTRES = {"AdamW": 1e-3, "KFAC": 1e-1, "Shampoo": 1e-3}
"""Learning rates that the grids begin around."""
WARMUP = 0.05
TUNED, SHOWN = 0, (1, 2, 3)
"""Seeds."""
GRID, EXTENDED = 2, 4
"""Rungs of the grid on each side of its centre, and by how many it may grow."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One run."""

    task: str
    method: str
    batch: int
    rung: int
    """Learning rate in half decades from the method's centre."""
    seed: int
    epochs: int = 10
    model: str = "minilm"
    limit: int | None = None

    @property
    def lr(self) -> float:
        """Its peak."""
        return float(f"{CENTRES[self.method] * 10 ** (self.rung / 2):.3g}")


def batches(examples: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of every batch: all whole batches of each pass, shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(examples, generator=generator).split(size)[: examples // size]


def train(case: Case, pairs: pair_features.Pairs) -> dict[str, Any]:
    """Run a case; its line of the results file."""
    network = pairs.network(case.seed)
    kind = case.method
    settings = BASELINES.get(kind) or resolve(kind).Config
    optimizer = make_optimizer(network, kind, settings(lr=case.lr, **METHODS[kind]), CPU)
    x_NF, y_N = pairs.features["train"], pairs.labels["train"]
    size = case.batch or len(y_N)
    steps = case.epochs * (len(y_N) // size)

    def rate(step: int) -> float:
        return min((step + 1) / max(1.0, WARMUP * steps), (steps - step) / steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    engine = SingleEngine(network, optimizer, CPU, 1, size, scheduler)
    engine.train()
    for chosen in batches(len(y_N), size, case.epochs, 1000 + case.seed):
        loss = pairs.loss(engine(x_NF[chosen]), y_N[chosen])
        if not math.isfinite(loss.item()):
            break
        engine.backward(loss, terms=size)
        engine.step()
    network.eval()
    found: dict[str, Any] = {"case": asdict(case), "lr": case.lr, "steps": steps}
    with torch.no_grad():
        for split in pair_features.SPLITS:
            out, label = network(pairs.features[split]), pairs.labels[split]
            found[f"{split}_loss"] = results_file.finite(float(pairs.loss(out, label)))
            found[f"{split}_score"] = pairs.score(out, label)
    engine.close()
    return found


def job(case: Case, cache: Path) -> dict[str, Any]:
    """A run in a process of its own."""
    torch.set_num_threads(1)
    return train(case, pair_features.load(case.task, case.model, cache, case.limit))


# -- tuning ------------------------------------------------------------------------------------------------------


Run = Callable[[Sequence[Case]], list[dict[str, Any]]]
"""Makes runs, or remembers them; their lines."""


def judged(line: dict[str, Any], key: str) -> float:
    """A loss that a learning rate is chosen by."""
    return math.inf if line[key] is None else float(line[key])


def tune(first: Case, run: Run, key: str) -> tuple[int, bool]:
    """The best rung of a cell by a loss, and whether it lies inside its grid."""
    rungs = list(range(-GRID, GRID + 1))
    lines = run([replace(first, rung=rung) for rung in rungs])
    found = {rung: judged(line, key) for rung, line in zip(rungs, lines, strict=True)}
    for _ in range(EXTENDED):
        best = min(found, key=lambda rung: found[rung])
        if best not in (min(found), max(found)):
            break
        further = best - 1 if best == min(found) else best + 1
        found[further] = judged(run([replace(first, rung=further)])[0], key)
    best = min(found, key=lambda rung: found[rung])
    return best, best not in (min(found), max(found))


class Runs:
    """Finished runs of a results file; makes those that are missing."""

    def __init__(self, path: Path, pool: ProcessPoolExecutor | None) -> None:
        self.path, self.pool, self.lock = path, pool, threading.Lock()
        self.found = {json.dumps(line["case"], sort_keys=True): line for line in results_file.read(path)}

    def __call__(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Their lines, in their order."""
        keys = [json.dumps(asdict(case), sort_keys=True) for case in cases]
        cache = self.path.parent
        missing = {key: case for key, case in zip(keys, cases, strict=True) if key not in self.found}
        if self.pool is None:
            for key, case in missing.items():
                self._keep(key, job(case, cache))
        else:
            started = {self.pool.submit(job, case, cache): key for key, case in missing.items()}
            for future in as_completed(started):
                self._keep(started[future], future.result())
        return [self.found[key] for key in keys]

    def _keep(self, key: str, line: dict[str, Any]) -> None:
        with self.lock:
            self.found[key] = line
            results_file.append(self.path, line)
            case = line["case"]
            name = f"{case['task']} {case['method']} batch {words(case['batch'])} seed {case['seed']}"
            print(f"{name} lr {line['lr']:g}: validation loss {line['validation_loss']}", flush=True)


def cell(first: Case, run: Run) -> dict[str, Any]:
    """A place of the table: for both measures the rate, whether it is inside its grid, and the values of the seeds."""
    out: dict[str, Any] = {"task": first.task, "method": first.method, "batch": first.batch}
    for tuned_by, shown in (("train_loss", "train_loss"), ("validation_loss", "test_score")):
        rung, inside = tune(first, run, tuned_by)
        lines = run([replace(first, rung=rung, seed=seed) for seed in SHOWN])
        out["steps"] = lines[0]["steps"]
        values = [math.nan if line[shown] is None else line[shown] for line in lines]
        out[shown] = {"lr": lines[0]["lr"], "inside": inside, "values": values}
    return out


# -- what is shown -----------------------------------------------------------------------------------------------


def words(batch: int) -> str:
    """A batch in words."""
    return str(batch) if batch else "all"


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
    seeds = [one[key]["values"] for one in own]
    middle = [fmean(values) for values in seeds]
    # the mean of equal values may be above them by a rounding
    below = [max(0.0, m - min(values)) for m, values in zip(middle, seeds, strict=True)]
    above = [max(0.0, max(values) - m) for m, values in zip(middle, seeds, strict=True)]
    # side by side, so that bars of equal height do not hide each other
    place = [batches.index(one["batch"]) + 0.08 * (index - 1) for one in own]
    look = {"color": COLOURS[index], "linestyle": STYLES[index], "marker": "os^"[index]}
    axis.errorbar(place, middle, [below, above], label=method, capsize=3, **look)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results, features and figure")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "stsb"])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="0: all examples")
    parser.add_argument("--limit", type=int, help="examples of each split; default: all")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at the same time, a process and a thread each"
    )
    args = parser.parse_args(argv)
    if "builtin" not in args.tasks and not os.environ.get("DSSO_DATA"):
        print("skipped: DSSO_DATA is not set, and MRPC and STS-B are real data")
        print(json.dumps({"skipped": "DSSO_DATA is not set"}))
        return {}
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        pair_features.load(task, args.model, args.out, args.limit)
    firsts = [
        Case(task, method, batch, 0, TUNED, args.epochs, args.model, args.limit)
        for task in args.tasks
        for batch in args.batches
        for method in METHODS
    ]
    path = args.out / "runs.jsonl"
    if args.jobs <= 1:
        runs = Runs(path, None)
        return report([cell(first, runs) for first in firsts], args.out / "batch_sizes.png")
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as processes,
        ThreadPoolExecutor(len(firsts)) as threads,
    ):
        runs = Runs(path, processes)
        cells = list(threads.map(lambda first: cell(first, runs), firsts))
    return report(cells, args.out / "batch_sizes.png")


if __name__ == "__main__":
    main()
