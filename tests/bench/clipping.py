"""Does clipping the Newton step keep K-FAC from diverging? None, pre and post side by side, and a grid of post.

    DSSO_DATA=... python tests/bench/clipping.py --out runs/clipping              # everything
    DSSO_DATA=... python tests/bench/clipping.py --out runs/clipping --only none  # one part: none, pre, post, grid
    python tests/bench/clipping.py --report runs/clipping/clipping.jsonl        # table and figure of a results file

Every run starts from the shipped recipe `configs/kfac_minilm_<task>_adapter.json` and trains through the project's
own tasks, K-FAC and single-device engine. A finished run is a line of `OUT/clipping.jsonl`; a run that has its line
is not repeated, so the script can be stopped at any time. The last line that it prints is one line of JSON.

`--senses` says on which scale the damping, 1e-4 by default, is added to both factors:

- `mean`: G is formed from gradients of the *mean* loss of the batch, as in code that takes what a backward hook
  delivers. It is n^2 times smaller than ours, n being the batch size.
- `term`: G on the project's own scale, that of one loss term (`damping_mode` "absolute_each").
- `split`: the project's scale, and the damping shared by both factors (`damping_mode` "absolute"), close to
  adding it to the eigenvalues of the whole Kronecker product.
- `relative`: for comparison, the damping of the shipped recipe instead, relative to the curvature.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import results_file  # noqa: E402
import stability  # noqa: E402
import torch  # noqa: E402

from dsso import engines, tasks  # noqa: E402
from dsso.recipe import ResolvedRecipe, load_recipe  # noqa: E402
from dsso.seeding import seed_everything  # noqa: E402
from dsso.tasks.data import global_batch  # noqa: E402

MODES = ("none", "pre", "post")
SENSES = ("mean", "term", "split", "relative")
GRID_LR, GRID_TAU = (0.01, 0.05, 0.1, 0.5), (0.1, 1.0, 2.0)
"""Learning rates and norms of the grid, out of the search space of the paper."""
FIRST_LR, FIRST_TAU = 0.01, 0.1
"""Of the three modes."""


@dataclass(frozen=True)
class Case:
    """One run; two equal cases give the same curve."""

    task: str
    clip: str
    sense: str
    lr: float
    tau: float
    damping: float | None = 1e-4
    """None: that of the recipe."""
    momentum: float = 0.0
    interval: int = 500
    """Steps between two measurements and factorizations."""
    model: str = "minilm"
    variant: str = "houlsby"
    bottleneck: int = 32
    steps: int = 60
    batch: int = 16
    max_length: int = 48
    seed: int = 0

    @property
    def key(self) -> str:
        """What tells it from any other case."""
        return json.dumps(asdict(self), sort_keys=True)

    def recipe(self) -> ResolvedRecipe:
        """The shipped recipe with this case's settings."""
        source = ROOT / "configs" / f"kfac_minilm_{self.task}_adapter.json"
        if not source.exists():
            source = ROOT / "configs" / "kfac_minilm_rte_adapter.json"
        settings = {
            "train_batch_size": self.batch,
            "zero_optimization.stage": 0,
            "dsso.engine": "single",
            "dsso.model.name": self.model,
            "dsso.peft.variant": self.variant,
            "dsso.peft.bottleneck": self.bottleneck,
            "dsso.task.name": self.task,
            "dsso.task.max_length": self.max_length,
            "dsso.train.max_steps": self.steps,
            "dsso.train.seed": self.seed,
            "optimizer.params.lr": self.lr,
            "optimizer.params.tau": self.tau,
            "optimizer.params.clip": self.clip,
            "optimizer.params.momentum": self.momentum,
            "optimizer.params.weight_decay": 1e-4,
            "optimizer.params.factor_interval": self.interval,
            "optimizer.params.inverse_interval": self.interval,
            "scheduler.params.warmup_num_steps": max(1, round(0.1 * self.steps)),
        }
        if self.damping is not None:
            mode = "absolute" if self.sense == "split" else "absolute_each"
            settings |= {"optimizer.params.damping": self.damping, "optimizer.params.damping_mode": mode}
        written = load_recipe(source, [f"{path}={json.dumps(value)}" for path, value in settings.items()])
        return written.resolved(1, self.steps)


def start(case: Case) -> tuple[Any, Any]:
    """The engine and the prepared task of a case, as `launch/train.py` would make them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = case.recipe()
    config = recipe.dsso
    seed_everything(case.seed)
    task = tasks.load_task(config.task, case.seed)
    bundle = tasks.adapters.apply(tasks.models.load(config.model, task, config.task), config.peft)
    data = tasks.prepare(task, bundle, config.task)
    engine = engines.build(bundle.model, recipe)
    seed_everything(case.seed)
    engine.train()
    return engine, data


def window(case: Case, engine: Any, data: Any, step: int) -> dict[str, float | None]:
    """One optimizer step; its figures, the loss being that before the step."""
    indices = global_batch(len(data.train), case.batch, case.seed, step)
    batch = data.collate([data.train[index] for index in indices], indices)
    terms = sum(data.terms(index) for index in indices)
    loss = data.loss_sum(engine(**batch.inputs), batch) / terms
    # With g the gradient of the mean loss, and `told` the number of terms that the engine is told, G is the sum of
    # (told g)(told g)^T over told. Told the truth, n, that is the scale of one loss term; told 1/n, it is the
    # average over examples of g g^T as it stands.
    engine.backward(loss, terms=1.0 / terms if case.sense == "mean" else terms)
    lr = engine.lr()
    engine.step()
    health = engine.health()
    return {
        "loss": results_file.finite(loss.item()),
        "update_norm": results_file.finite(health["update_norm"]),
        "grad_norm": results_file.finite(health["grad_norm"]),
        "step_length": results_file.finite(lr * health["clip_scale"] * health["update_norm"]),
        "clipped": float(health["clip_scale"] < 1.0),
        "cos": results_file.finite(health["cos_update_grad"]),
    }


def train(case: Case) -> dict[str, Any]:
    """Run a case; its line of the results file."""
    engine, data = start(case)
    started = time.monotonic()
    steps = [window(case, engine, data, step) for step in range(case.steps)]
    health = engine.health()
    engine.close()
    labels = [float(example.label) for example in data.task.train if example.label is not None]
    return {
        "case": asdict(case),
        "constant_loss": stability.constant_loss(labels, data.loss_kind),
        "seconds": round(time.monotonic() - started, 1),
        "skipped": health["skipped_steps"],
        "layers_without_factors": health["layers_without_factors"],
        "commit": commit(),
        "torch": torch.__version__,
        "curves": {name: [line[name] for line in steps] for name in steps[0]},
    }


def commit() -> str:
    """Short hash of the checked-out commit; the environment variable COMMIT where there is no repository."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else os.environ.get("COMMIT", "unknown")


def plan(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, the three modes first."""
    names = ("steps", "batch", "max_length", "model", "variant", "bottleneck", "momentum", "seed")
    common = {name: getattr(arguments, name) for name in names}
    damping = {sense: None if sense == "relative" else arguments.damping for sense in SENSES}
    wanted = arguments.only or [*MODES, "grid"]
    cases = [
        Case(task, mode, sense, FIRST_LR, FIRST_TAU, damping[sense], **common)
        for sense in arguments.senses
        for mode in MODES
        if mode in wanted
        for task in arguments.tasks
    ]
    if "grid" in wanted:
        sense = arguments.senses[0]
        cases += [
            Case(task, "post", sense, lr, tau, damping[sense], **common)
            for lr in arguments.grid_lr
            for tau in arguments.grid_tau
            for task in arguments.tasks
        ]
    return list(dict.fromkeys(cases))


def run(cases: Sequence[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Lines of the results file, in the order in which the runs end."""
    if jobs <= 1:
        yield from map(train, cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, case) for case in cases]):
            yield future.result()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/clipping"), help="folder of the results")
    parser.add_argument("--only", nargs="*", choices=[*MODES, "grid"], help="parts to run; default: all")
    parser.add_argument("--tasks", nargs="+", default=["stsb", "rte"])
    parser.add_argument(
        "--senses", nargs="+", choices=SENSES, default=["mean"], help="the grid takes the first"
    )
    parser.add_argument("--grid-lr", type=float, nargs="+", default=GRID_LR)
    parser.add_argument("--grid-tau", type=float, nargs="+", default=GRID_TAU)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--variant", choices=["houlsby", "pfeiffer"], default="houlsby")
    parser.add_argument("--bottleneck", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process")
    parser.add_argument("--report", type=Path, help="train nothing: table and figure of this results file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table, draw the figure and print the summary."""
    arguments = parse(argv)
    if arguments.report is not None:
        return report(results_file.read(arguments.report), arguments.report.with_suffix(".png"))
    if "builtin" not in arguments.tasks and not os.environ.get("DSSO_DATA"):
        print("skipped: DSSO_DATA is not set, and STS-B and RTE are real data")
        print(json.dumps({"skipped": "DSSO_DATA is not set"}))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "clipping.jsonl"
    cases = plan(arguments)
    done = {Case(**line["case"]).key for line in results_file.read(path)}
    missing = [case for case in cases if case.key not in done]
    print(f"{len(cases)} runs, {len(cases) - len(missing)} of them finished before", flush=True)
    for line in run(missing, arguments.jobs):
        results_file.append(path, line)
        print(stability.describe(line), flush=True)
    keys = {case.key for case in cases}
    return report(
        [line for line in results_file.read(path) if Case(**line["case"]).key in keys],
        path.with_suffix(".png"),
    )


def report(found: Sequence[dict[str, Any]], picture: Path) -> int:
    """Print the tables and the summary, and draw the figure."""
    print(stability.table(found))
    stability.draw(found, picture)
    print(f"figure: {picture}")
    print(json.dumps(stability.summary(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
