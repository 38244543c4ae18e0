"""Runs of a small network on sentence pairs: one method, batch, learning rate and seed each, kept as they end.

The network and its features are those of `pair_features.py`. A run sees the training data `epochs` times whatever its
batch, under a linear warm-up over the first twentieth of its steps and a linear decay to nothing. Learning rates are
half a decade apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import pair_features
import results_file
import torch
from torch import Tensor

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim import resolve
from dsso.plots import COLOURS, STYLES
from dsso.recipe_models import BASELINES

FULL = 0
"""Batch of all training examples."""
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
    settings: dict[str, Any]
    """Of the method, beside its learning rate."""
    centre: float
    """Learning rate that the grid begins around."""
    rung: int = 0
    """Learning rate in half decades from the centre."""
    seed: int = TUNED
    epochs: int = 10
    model: str = "minilm"
    limit: int | None = None

    @property
    def lr(self) -> float:
        """Its peak."""
        return float(f"{self.centre * 10 ** (self.rung / 2):.3g}")


def words(batch: int) -> str:
    """A batch in words."""
    return str(batch) if batch else "all"


def batches(examples: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of every batch: all whole batches of each pass, shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(examples, generator=generator).split(size)[: examples // size]


def train(case: Case, pairs: pair_features.Pairs) -> dict[str, Any]:
    """Run a case; its line of the results file."""
    network = pairs.network(case.seed)
    settings = BASELINES.get(case.method) or resolve(case.method).Config
    optimizer = make_optimizer(network, case.method, settings(lr=case.lr, **case.settings), CPU)
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
    """The best rung of a case by a loss, and whether it lies inside its grid."""
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


def tuned(first: Case, run: Run, by: str, shown: str) -> dict[str, Any]:
    """Three seeds at the rate that was best on another: rate, whether it is inside its grid, values, steps."""
    rung, inside = tune(first, run, by)
    lines = run([replace(first, rung=rung, seed=seed) for seed in SHOWN])
    values = [math.nan if line[shown] is None else line[shown] for line in lines]
    return {"lr": lines[0]["lr"], "inside": inside, "values": values, "steps": lines[0]["steps"]}


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


T = TypeVar("T")
Cell = TypeVar("Cell")


def all_of(cells: Sequence[Cell], work: Callable[[Cell, Run], T], path: Path, jobs: int) -> list[T]:
    """What `work` finds of every cell, with so many runs at a time."""
    if jobs <= 1:
        runs = Runs(path, None)
        return [work(cell, runs) for cell in cells]
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes,
        ThreadPoolExecutor(len(cells)) as threads,
    ):
        runs = Runs(path, processes)
        return list(threads.map(lambda cell: work(cell, runs), cells))


def bars(
    axis: Any, places: Sequence[float], seeds: Sequence[Sequence[float]], label: str, index: int
) -> None:
    """A course of means over seeds, their ranges as bars.

    Args:
        axis: matplotlib's.
        places: abscissae.
        seeds: values at each of them.
        label: of the course.
        index: which one it is, 0 to 3.
    """
    middle = [fmean(values) for values in seeds]
    # the mean of equal values may be above them by a rounding
    below = [max(0.0, m - min(values)) for m, values in zip(middle, seeds, strict=True)]
    above = [max(0.0, max(values) - m) for m, values in zip(middle, seeds, strict=True)]
    look = {"color": COLOURS[index], "linestyle": STYLES[index], "marker": "os^v"[index]}
    axis.errorbar(places, middle, [below, above], label=label, capsize=3, **look)


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace | None:
    """The command line that scripts of such runs share, features made; None where there is no data to run on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results, features and figure")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "stsb"])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", help="0: all examples; default: those of the page")
    parser.add_argument("--limit", type=int, help="examples of each split; default: all")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at the same time, a process and a thread each"
    )
    args = parser.parse_args(argv)
    if "builtin" not in args.tasks and not os.environ.get("DSSO_DATA"):
        print("skipped: DSSO_DATA is not set, and MRPC and STS-B are real data")
        print(json.dumps({"skipped": "DSSO_DATA is not set"}))
        return None
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        pair_features.load(task, args.model, args.out, args.limit)
    return args
