"""Does a LoRA matrix need its long side preconditioned? `sides: auto` against `all`, MiniLM on SST-2, three seeds.

    DSSO_DATA=... python tests/bench/lora_sides.py --out runs/sides            # half an hour on one core
    DSSO_DATA=... python tests/bench/lora_sides.py --out runs/sides --quick    # few steps, one seed: it runs

LoRA of rank 8 on all linear layers of the pretrained MiniLM and a classifier, 100 steps of batch 16. With `auto`, the
default, Shampoo and SOAP (renewed at every 10th step) precondition the rank's side alone, with `all` the model's side
too, cut at 1,024. The learning rate is searched for each of the four by itself, over the same three rates, by the mean
training loss of the last 30 steps of a run with a seed of its own; the figures are that loss and the validation loss of
three further seeds. AdamW, searched alike, is the measure. Runs are `launch/train.py`; a finished run is not repeated.
The last line is one line of JSON.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import launched

STEPS, LAST, SEARCH_SEED, SEEDS = 100, 30, 100, (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
VARIANTS: dict[str, list[str]] = {
    "AdamW": ["optimizer.type=AdamW"],
    "Shampoo, auto": ["optimizer.type=Shampoo", "optimizer.params.sides=auto"],
    "Shampoo, all": ["optimizer.type=Shampoo", "optimizer.params.sides=all"],
    "SOAP, auto": ["optimizer.type=SOAP", "optimizer.params.sides=auto"],
    "SOAP, all": ["optimizer.type=SOAP", "optimizer.params.sides=all"],
}


def run(variant: str, rate: float, seed: int, out: Path, steps: int) -> tuple[float, float]:
    """Training loss at the end and validation loss of one run."""
    settings = [
        f"optimizer.params={json.dumps({'lr': rate})}",
        *VARIANTS[variant],
        "train_batch_size=16",
        "dsso.task.name=sst2",
        "dsso.task.max_length=64",
        "dsso.task.train_examples=2000",
        "dsso.task.eval_examples=400",
        f"dsso.train.max_steps={steps}",
        f"dsso.train.eval_interval={steps}",
        f"dsso.train.save_interval={steps}",
        "dsso.train.log_interval=1",
        f"dsso.train.seed={seed}",
    ]
    if variant != "AdamW":
        settings += ["optimizer.params.refresh_interval=10", "gradient_clipping=0"]
    place = out / f"{variant.replace(', ', '_')}_{rate:g}_{seed}_{steps}"
    found = launched.lines("adamw_minilm_mrpc_lora.json", place, settings)
    losses = [line["loss"] for line in found if "loss" in line]
    evaluated = [line["eval"] for line in found if line.get("eval", {}).get("split") == "validation"]
    return fmean(losses[-LAST:]), float(evaluated[-1]["metrics"]["loss"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, run, print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="4 steps, one rate, one seed")
    options = parser.parse_args(arguments)
    if not os.environ.get("DSSO_DATA"):
        print("skipped: DSSO_DATA is not set, and SST-2 is real data")
        print(json.dumps({"skipped": "DSSO_DATA is not set"}))
        return
    steps, seeds, rates = (4, SEEDS[:1], RATES[1:2]) if options.quick else (STEPS, SEEDS, RATES)
    with ThreadPoolExecutor(options.workers) as pool:

        def all_of(jobs: list[tuple[str, float, int]]) -> list[tuple[float, float]]:
            return list(pool.map(lambda job: run(*job, options.out, steps), jobs))

        searched = [(variant, rate, SEARCH_SEED) for variant in VARIANTS for rate in rates]
        ends = dict(zip(searched, all_of(searched), strict=True))
        best = {v: min(rates, key=lambda rate: ends[v, rate, SEARCH_SEED][0]) for v in VARIANTS}
        wanted = [(variant, best[variant], seed) for variant in VARIANTS for seed in seeds]
        found = dict(zip(wanted, all_of(wanted), strict=True))
    print(f"training loss of the last {min(LAST, steps)} of {steps} steps, and validation loss, by seed")
    summary: dict[str, Any] = {}
    for variant, rate in best.items():
        train, valid = zip(*(found[variant, rate, seed] for seed in seeds), strict=True)
        edge = len(rates) > 1 and rate in {rates[0], rates[-1]}
        summary[variant] = {"lr": rate, "edge": edge, "train": train, "validation": valid}
        print(
            f"{variant:13s} lr {rate:.0e}{' (edge)' if edge else '       '}  "
            + "  ".join(f"{one:.4f}" for one in train)
            + f"  mean {fmean(train):.4f} | "
            + "  ".join(f"{one:.4f}" for one in valid)
            + f"  mean {fmean(valid):.4f}"
        )
    print(json.dumps({"steps": steps, "quick": options.quick, **summary}))


if __name__ == "__main__":
    main()
