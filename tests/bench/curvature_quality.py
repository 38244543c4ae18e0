"""How good a curvature becomes, by iterations and by batch size: PSGD, K-FAC of one batch, K-FAC averaged.

    python tests/bench/curvature_quality.py --out runs/quality     # table, figure, and a last line of JSON

A linear layer whose inputs and output gradients are Gaussian and independent, so that its curvature is exactly A (x) G:
what is compared is the estimate alone. In every iteration a fresh batch of n examples gives A_n and G_n, and the change
of the gradient h = G_n V A_n along a random displacement V. Measured is c(P) / c* of `dsso.curvature.quality`, exactly,
with S = E[h h^T] over batches of that size: 1 is the best that a preconditioner can be for what such batches answer.

After Ishikawa and Yokota 2024, figure 2, whose claim is that PSGD's curvature depends on iterations and not on the
batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from dsso.curvature.quality import quality, wishart_moment  # noqa: E402
from dsso.optim.psgd import fit  # noqa: E402
from dsso.plots import COLOURS, STYLES  # noqa: E402
from dsso.results import text_table  # noqa: E402

INPUTS, OUTPUTS = 6, 5
DECADES = 0.7
"""Between the largest and the smallest eigenvalue of A, and of G."""
BATCHES = (16, 64, 256, 1024)
RATE = 0.03
"""Of PSGD's fit."""
DECAY = 0.95
"""Of K-FAC's averages."""


def covariance(side: int, seed: int) -> Tensor:
    """Of known eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0]
    return q * torch.logspace(0, -DECADES, side, dtype=torch.float64) @ q.mT


def courses(batch: int, iterations: int, seed: int) -> dict[str, list[float]]:
    """c(P) / c* after every iteration, by method."""
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    sides = [covariance(OUTPUTS, 1), covariance(INPUTS, 0)]
    halves = [torch.linalg.cholesky(side) for side in sides]
    moments = [wishart_moment(side, batch) for side in sides]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [torch.eye(OUTPUTS, dtype=torch.float64), torch.eye(INPUTS, dtype=torch.float64)]
    sums = [torch.zeros_like(side) for side in sides]
    out: dict[str, list[float]] = {"psgd": [], "kfac_one": [], "kfac_averaged": []}
    out["psgd"].append(quality([q.mT @ q for q in factors], moments))
    for turn in range(iterations):
        draws = [normal(batch, len(half)) @ half.mT for half in halves]
        g, a = (x.mT @ x / batch for x in draws)
        v = normal(OUTPUTS, INPUTS)
        factors = fit(factors, (0, 1), g @ v @ a, v, RATE)
        sums = [DECAY * s + (1 - DECAY) * new for s, new in zip(sums, (g, a), strict=True)]
        debiased = [s / (1 - DECAY ** (turn + 1)) for s in sums]
        out["psgd"].append(quality([q.mT @ q for q in factors], moments))
        out["kfac_one"].append(quality([torch.linalg.inv(g), torch.linalg.inv(a)], moments))
        out["kfac_averaged"].append(quality([torch.linalg.inv(s) for s in debiased], moments))
    return out


def draw(found: dict[int, dict[str, list[float]]], file: Path) -> None:
    """The three courses, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "psgd": f"PSGD, Newton pairs, rate {RATE:g}",
        "kfac_one": "K-FAC, factors of one batch (medians of 20)",
        "kfac_averaged": f"K-FAC, factors averaged with decay {DECAY:g}",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for index, (batch, courses_) in enumerate(found.items()):
            values = courses_[key]
            # A batch of its own has no course: medians of neighbours are drawn.
            width = 20 if key == "kfac_one" else 1
            chunks = [values[at : at + width] for at in range(0, len(values), width)]
            axis.plot(
                range(1, len(values) + 1, width),
                [statistics.median(chunk) for chunk in chunks],
                color=COLOURS[index],
                linestyle=STYLES[index],
                linewidth=1.4,
                label=f"{batch} examples",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("c(P) / c*   (1 is best)")
    axes[0].set_ylim(0.95, 4)
    axes[0].legend(title="a batch", fontsize=9)
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figure")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {batch: courses(batch, args.iterations, args.seed) for batch in BATCHES}
    args.out.mkdir(parents=True, exist_ok=True)
    draw(found, args.out / "curvature_quality.png")
    table, last = [], {}
    for batch, by_method in found.items():
        psgd = by_method["psgd"]
        tail = psgd[-max(1, len(psgd) // 10) :]
        line = {
            "psgd_first": psgd[0],
            "psgd_last": statistics.median(tail),
            "psgd_worst_of_last": max(tail),
            "kfac_one": statistics.median(by_method["kfac_one"]),
            "kfac_averaged": statistics.median(by_method["kfac_averaged"][-len(tail) :]),
        }
        last[str(batch)] = {key: round(value, 4) for key, value in line.items()}
        table.append([str(batch), *(f"{value:.3f}" for value in line.values())])
    heads = ["batch", "PSGD at first", "PSGD, last tenth", "its worst", "K-FAC, one batch", "K-FAC, averaged"]
    print(text_table([heads, *table]))
    print(f"figure: {args.out / 'curvature_quality.png'}")
    print(json.dumps(last))
    return last


if __name__ == "__main__":
    main()
