"""What K-FAC costs beside AdamW: time, memory and traffic on workload R, as ratios.

    python tests/bench/kfac.py --out runs/bench            # everything; about half an hour on one core
    python tests/bench/kfac.py --out runs/bench --quick    # few steps, to see that it runs

All contestants take turns in one process, step by step, and CPU time is compared, so that other load on the machine
meets them alike; figures are medians. kfac-pytorch takes part where it can be imported; otherwise its ratios, measured
on the same workload elsewhere, are shown as quoted, as asdl's are. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
import workload_r as workload  # noqa: E402
from torch import nn  # noqa: E402

from dsso.engines.single import SingleEngine  # noqa: E402
from dsso.optim._partition import Clipping, PartitionOptimizer  # noqa: E402
from dsso.optim.kfac import Config, Method  # noqa: E402

CPU = torch.device("cpu")
ONCE = [[0, 1], [2, None]]
"""On the first two steps only."""
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "subsampled": {"token_stride": 8},
    "low_rank": {"low_rank": 32, "low_rank_above": 256},
}
QUOTED = {
    "kfac-pytorch 0.4.2 (eigen), quoted": (12.5, 2.80, 1.17, 1.43, 12.6),
    "asdl (Cholesky), quoted": (4.6, 2.45, 1.14, 1.29, 4.6),
}
"""Ratios of others on workload R, measured on another CPU, one thread: every step, factors only, plain step, every
10 / 100 amortised, slowest step over the median."""
WORLDS = (1, 2, 4, 8)
Step = Callable[[int], None]


def adamw() -> Step:
    """The step that everything is compared with: torch's AdamW."""
    model = workload.model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(number: int) -> None:
        ids, labels = workload.batch(number)
        workload.loss(model(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def method(model: nn.Module, rank: int = 0, world_size: int = 1, **settings: Any) -> Method:
    """K-FAC for the model, as this rank of that many."""
    return Method(Config(**settings), model, CPU, rank, world_size, {"ids": workload.batch(0)[0][:1]})


class Kfac:
    """A K-FAC contestant."""

    def __init__(self, **settings: Any) -> None:
        self.model = workload.model()
        self.method = method(self.model, lr=1e-2, **settings)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = PartitionOptimizer(
            parameters, 1e-2, self.method.rules(), self.method, Clipping("post", 1.0)
        )
        self.engine = SingleEngine(self.model, optimizer, CPU, 1, workload.BATCH)
        self.engine.train()

    def __call__(self, number: int) -> None:
        ids, labels = workload.batch(number)
        loss = workload.loss(self.engine(ids), labels)
        self.engine.backward(loss, terms=workload.BATCH * workload.TOKENS)
        self.engine.step()


def kfac_pytorch() -> Step | None:
    """The public package, refreshed every step; None where it is not installed."""
    with contextlib.suppress(ImportError):
        from kfac.preconditioner import KFACPreconditioner  # type: ignore[import-not-found]

        model = workload.model()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        preconditioner = KFACPreconditioner(
            model, factor_update_steps=1, inv_update_steps=1, skip_layers=["base", "head", "embed"]
        )

        def step(number: int) -> None:
            ids, labels = workload.batch(number)
            workload.loss(model(ids), labels).backward()
            preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()

        return step
    return None


def turns(contestants: Mapping[str, Step], steps: int, warm: int) -> dict[str, list[float]]:
    """CPU seconds of every step of every contestant, one after another, without the first `warm`."""
    out: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm + steps):
        for name, step in contestants.items():
            begun = time.process_time()
            step(number)
            if number >= warm:
                out[name].append(time.process_time() - begun)
    return out


def kinds_of_steps(steps: int) -> tuple[dict[str, dict[str, float]], float | None]:
    """Ratios to AdamW of a step that measures and factorizes, one that measures, and one that does neither."""
    kinds = {
        "every_step": {"factor_interval": 1, "inverse_interval": 1},
        "factor_step": {"factor_interval": 1, "inverse_interval": ONCE},
        "plain_step": {"factor_interval": ONCE, "inverse_interval": ONCE},
    }
    out: dict[str, dict[str, float]] = {}
    peer: float | None = None
    for variant, settings in VARIANTS.items():
        contestants: dict[str, Step] = {"adamw": adamw()}
        contestants |= {kind: Kfac(**settings, **kind_settings) for kind, kind_settings in kinds.items()}
        other = kfac_pytorch() if variant == "exact" else None
        if other is not None:
            contestants["kfac_pytorch"] = other
        seconds = turns(contestants, steps, 3)
        base = median(seconds["adamw"])
        out[variant] = {kind: median(seconds[kind]) / base for kind in kinds}
        if other is not None:
            peer = median(seconds["kfac_pytorch"]) / base
        show(variant, out[variant])
    return out, peer


def amortised(period: int, repeats: int) -> dict[str, dict[str, float]]:
    """Mean step over a whole period with measurements every 10 and factorizations every 100, and the slowest one.

    The period is gone through several times; of every step in it the median over the repeats counts, so that a
    disturbance from outside is not taken for a spike.
    """
    out: dict[str, dict[str, float]] = {}
    for variant, settings in VARIANTS.items():
        run = Kfac(**settings, factor_interval=[[0, 1], [1, 10]], inverse_interval=[[0, 1], [1, 100]])
        seconds = turns({"adamw": adamw(), "kfac": run}, period * repeats, 1)
        base = median(seconds["adamw"])
        places = [median(seconds["kfac"][place::period]) for place in range(period)]
        out[variant] = {
            "amortised_10_100": sum(places) / len(places) / base,
            "spike": max(places) / median(places),
        }
        show(variant, out[variant])
    return out


def cosines(windows: int) -> dict[str, float]:
    """Cosine between each variant's update and the exact one, over all layers, after some windows on the same data."""
    runs = {
        name: Kfac(**settings, factor_interval=1, inverse_interval=1) for name, settings in VARIANTS.items()
    }
    for number in range(windows):
        for run in runs.values():
            # Frozen weights: all of them measure the same model on the same data.
            run.engine.optimizer.param_groups[0]["lr"] = 0.0
            run(number)
    ids, labels = workload.batch(windows)
    model = runs["exact"].model
    workload.loss(model(ids), labels).backward()
    gradients = {n: p.grad.reshape(-1) for n, p in model.named_parameters() if p.grad is not None}
    updates = {
        name: torch.cat(list(run.method.precondition(gradients)[0].values())) for name, run in runs.items()
    }
    exact = updates["exact"]
    return {name: torch.cosine_similarity(exact, u, dim=0).item() for name, u in updates.items()}


def held_bytes() -> dict[str, dict[int, list[int]]]:
    """Bytes of factors and factorizations on every rank, counted from the tensors that each rank makes."""
    model = workload.model()
    out: dict[str, dict[int, list[int]]] = {}
    for variant, settings in VARIANTS.items():
        out[variant] = {}
        for world in WORLDS:
            counted = []
            for rank in range(world):
                made = method(model, rank, world, **settings)
                counted.append(made.state_bytes())
                made.close()
            out[variant][world] = counted
    return out


def wire() -> dict[str, float]:
    """Numbers that two real ranks put on the wire in one measurement, over those of an unpacked all-reduce."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(HERE / "wire.py")], capture_output=True, text=True, check=True, timeout=900
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(name: str, figures: Mapping[str, float]) -> None:
    """A line of what was just measured."""
    print(f"{name:12s} " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


def table(results: Mapping[str, Mapping[str, Any]], peer: float | None) -> str:
    """All ratios, ours and others'."""
    keys = ("every_step", "factor_step", "plain_step", "amortised_10_100", "spike", "cosine")
    rows: list[Sequence[str]] = [("CPU time / AdamW step", *(key.replace("_", " ") for key in keys))]
    rows += [(f"dsso {name}", *(f"{one[key]:.3f}" for key in keys)) for name, one in results.items()]
    if peer is not None:
        rows.append(("kfac-pytorch, this run", f"{peer:.2f}", *[""] * 5))
    quoted = {name: values for name, values in QUOTED.items() if peer is None or "kfac-pytorch" not in name}
    rows += [(name, *(f"{value:.2f}" for value in values), "") for name, values in quoted.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of the ratios, ours beside others'."""
    from matplotlib.figure import Figure

    keys = ("every_step", "factor_step", "plain_step", "amortised_10_100", "spike")
    labels = (
        "every step",
        "factors only",
        "plain step",
        "every 10 / 100,\namortised",
        "slowest step\n/ median",
    )
    groups = {f"dsso, {name.replace('_', ' ')}": [one[key] for key in keys] for name, one in results.items()}
    groups |= {name: list(values) for name, values in QUOTED.items()}
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axis = figure.add_subplot()
    width = 0.8 / len(groups)
    colours = ("#0072B2", "#56B4E9", "#009E73", "#999999", "#CCCCCC")
    for index, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=True)):
        places = [at + (index - (len(groups) - 1) / 2) * width for at in range(len(keys))]
        bars = axis.bar(places, values, width * 0.92, label=name, color=colour)
        axis.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(0.9, 20)
    axis.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axis.set_xticks(range(len(keys)), labels)
    axis.set_ylabel("CPU time over an AdamW step")
    axis.set_title("K-FAC beside AdamW: 6-layer encoder, LoRA r = 8, one CPU thread (quoted: another CPU)")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print the table, draw, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the figure and the summary")
    parser.add_argument(
        "--quick", action="store_true", help="few steps: it runs, but says little of the cost"
    )
    parser.add_argument("--repeats", type=int, default=3, help="times that a whole interval is gone through")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    quick = arguments.quick
    results: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS}
    kinds, peer = kinds_of_steps(2 if quick else 9)
    if quick:
        print("a quick run: of the period of 100 steps only ten, so no figure of a whole interval")
    periods = amortised(10 if quick else 100, 1 if quick else arguments.repeats)
    angles = cosines(2 if quick else 10)
    held, sent = held_bytes(), wire()
    for name, one in results.items():
        one |= {**kinds[name], **periods[name], "cosine": angles[name]}
        one["bytes_per_rank"] = {str(world): max(counted) for world, counted in held[name].items()}
        one["wire_ratio"] = sent[name]
    print(table(results, peer))
    for name, counted in held.items():
        whole = counted[1][0]
        shares = ", ".join(f"W={world} {max(ranks) / 1e6:.1f} MB" for world, ranks in counted.items())
        print(f"{name}: bytes per rank {shares} (whole {whole / 1e6:.1f} MB); wire ratio {sent[name]:.3f}")
    draw(results, arguments.out / "kfac.png")
    summary = json.dumps(results)
    (arguments.out / "kfac.json").write_text(summary + "\n", encoding="utf-8")
    print(f"figure: {arguments.out / 'kfac.png'}")
    print(summary)


if __name__ == "__main__":
    main()
