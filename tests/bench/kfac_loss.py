"""Does a cheap form of K-FAC reach the loss of the exact one? MiniLM with LoRA on MRPC, 200 steps, three seeds.

    DSSO_DATA=... python tests/bench/kfac_loss.py --out runs/loss

Every run is `launch/train.py` on the shipped recipe `configs/kfac_minilm_mrpc_lora.json` in one process; what differs
is set on the command line. The figure is the mean training loss of the last 50 steps. A cheap form passes when its mean
over the seeds lies within the range of the exact one's seeds, or below it. A finished run is not repeated, so the
script can be stopped at any time. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent))

import launched

STEPS, LAST = 200, 50
VARIANTS: dict[str, list[str]] = {
    "exact": [],
    "subsampled": ["optimizer.params.token_stride=8"],
    "low_rank": ["optimizer.params.low_rank=32", "optimizer.params.low_rank_above=256"],
}


def run(variant: str, seed: int, out: Path) -> list[float]:
    """Training losses of one run, as logged; trains only what is missing."""
    settings = [
        f"dsso.train.max_steps={STEPS}",
        f"dsso.train.seed={seed}",
        f"dsso.train.eval_interval={STEPS}",
        "dsso.train.log_interval=10",
        *VARIANTS[variant],
    ]
    found = launched.lines("kfac_minilm_mrpc_lora.json", out / f"{variant}_{seed}", settings)
    return [line["loss"] for line in found if "loss" in line]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    options = parser.parse_args(arguments)
    if not os.environ.get("DSSO_DATA"):
        parser.error("DSSO_DATA is not set: it names the folder with the data of MRPC")
    jobs = [(variant, seed) for seed in options.seeds for variant in VARIANTS]
    with ThreadPoolExecutor(options.workers) as pool:
        curves = list(pool.map(lambda job: run(*job, options.out), jobs))
    ends: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for (variant, _), losses in zip(jobs, curves, strict=True):
        ends[variant].append(fmean(losses[-LAST // 10 :]))
    low, high = min(ends["exact"]), max(ends["exact"])
    print(f"mean training loss of the last {LAST} of {STEPS} steps, by seed; exact: {low:.4f} to {high:.4f}")
    summary = {}
    for variant, values in ends.items():
        mean = fmean(values)
        summary[variant] = {"seeds": values, "mean": mean, "within": mean <= high}
        print(f"{variant:10s} " + "  ".join(f"{value:.4f}" for value in values) + f"  mean {mean:.4f}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
