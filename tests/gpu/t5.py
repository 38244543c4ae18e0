"""Step time and peak memory of K-FAC over AdamW: T5-3B with LoRA r = 8 on q and v, bf16, one device.

    python tests/gpu/t5.py --out runs/gpu                              # T5-3B from its published sizes, random weights
    python tests/gpu/t5.py --out runs/gpu --device cpu --layers 2 --width 64 --source 16   # tiny

AdamW, and K-FAC with measurements every 10 and factorizations every 100 steps, exact and of low rank, one after
another in one process: median and slowest step, mean over the steps of a whole interval, and the peak of the
allocator. Before them, one dense factor with 8 columns, applied by triangular solves and by its inverse: which of the
two `apply = "auto"` takes rests on that ratio. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from dsso.engines import make_optimizer  # noqa: E402
from dsso.engines.single import SingleEngine  # noqa: E402
from dsso.optim._factor import DenseBlock  # noqa: E402
from dsso.optim.kfac import BaseConfig, Config  # noqa: E402
from dsso.recipe_models import AdamWConfig  # noqa: E402

BATCH, TARGET = 8, 16
INTERVALS: dict[str, Any] = {"factor_interval": [[0, 1], [2, 10]], "inverse_interval": [[0, 1], [2, 100]]}
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "exact": {},
    "low_rank": {"low_rank": 64, "low_rank_above": 1024},
}


def plain_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """T5 with random weights; bf16."""
    from transformers import T5Config, T5ForConditionalGeneration

    wide = arguments.width
    heads = {"d_kv": 128, "num_heads": 32} if wide >= 1024 else {"d_kv": 16, "num_heads": 4}
    sizes = {"d_model": wide, "d_ff": 16 * wide, **heads}
    config = T5Config(
        vocab_size=32128,
        num_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return T5ForConditionalGeneration(config).to(torch.bfloat16)


def model(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same with LoRA on q and v."""
    from peft import LoraConfig, get_peft_model

    base = plain_model(arguments, device)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    made = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"], lora_dropout=0.0))
    return made.to(torch.bfloat16).train()


def contestant(made: nn.Module, settings: dict[str, Any] | None, device: torch.device) -> SingleEngine:
    """The engine with the optimizer under test."""
    if settings is None:
        optimizer = make_optimizer(made, "AdamW", AdamWConfig(lr=1e-4), device)
    else:
        config = Config(lr=1e-3, base=BaseConfig(type="AdamW"), **INTERVALS, **settings)
        optimizer = make_optimizer(made, "KFAC", config, device)
    return SingleEngine(made, optimizer, device, 1, BATCH)


def measure(engine: SingleEngine, device: torch.device, arguments: argparse.Namespace) -> dict[str, float]:
    """Times of steps after a warm-up, and the peak of memory from the warm-up on."""
    steps, seconds = arguments.steps, arguments.seconds / len(CONTESTANTS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, (BATCH, arguments.source), generator=generator).to(device)
    labels = torch.randint(3, 32000, (BATCH, TARGET), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    begun = time.monotonic()
    for step in range(5 + steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = engine(**inputs).loss
        engine.backward(loss, terms=float(labels.numel()))
        engine.step()
        if cuda:
            torch.cuda.synchronize()
        if step >= 5:
            times.append(time.perf_counter() - start)
            if time.monotonic() - begun > seconds:
                break
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    if len(times) < steps:
        print(
            f"cut short after {len(times)} of {steps} steps: the mean is not that of a whole interval",
            flush=True,
        )
    return {
        "steps": len(times),
        "median_s": median(times),
        "mean_s": sum(times) / len(times),
        "slowest_s": max(times),
        "peak_bytes": peak,
        "state_bytes": engine.state_bytes(),
    }


def forms(device: torch.device, side: int) -> dict[str, float]:
    """Median seconds of a factor at work, and of making it, by form."""
    x_DD = torch.eye(side, device=device) * 2
    v_DR = torch.randn(side, 8, device=device)
    one, yes = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
    found = {}
    for name, inverse in (("solve", False), ("inverse", True)):
        block = DenseBlock(side, one, torch.float32, inverse)
        block.average(x_DD.clone(), None, one * 0, yes)
        job = block.job(one, one, 0.0, torch.float32)
        block.keep(job(), yes)
        for what, run in ((name, partial(block.solve, v_DR)), (f"make_{name}", job)):
            times = []
            for _ in range(12):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            found[f"{what}_s"] = median(times[2:])
    return {**found, "side": side, "solve_over_inverse": found["solve_s"] / found["inverse_s"]}


def main() -> None:
    """Run all, print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--source", type=int, default=256, help="tokens of an example's source")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all contestants together")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    applied = forms(device, 4 * arguments.width)
    print(
        f"a factor of side {applied['side']}, 8 columns: solves / product {applied['solve_over_inverse']:.2f}"
    )
    results: dict[str, dict[str, float]] = {}
    for name, settings in CONTESTANTS.items():
        made = model(arguments, device)
        engine = contestant(made, settings, device)
        results[name] = measure(engine, device, arguments)
        engine.close()
        del engine, made
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    base = results["adamw"]
    print(
        f"{'':10s} {'steps':>5s} {'mean / AdamW':>12s} {'slowest / median':>16s} {'peak over AdamW':>15s} {'state':>9s}"
    )
    for name, one in results.items():
        one["time_ratio"] = one["mean_s"] / base["mean_s"]
        one["spike"] = one["slowest_s"] / one["median_s"]
        one["peak_over_bytes"] = one["peak_bytes"] - base["peak_bytes"]
        print(
            f"{name:10s} {one['steps']:5.0f} {one['time_ratio']:12.3f} {one['spike']:16.2f}"
            f" {one['peak_over_bytes'] / 1e9:12.2f} GB {one['state_bytes'] / 1e9:6.2f} GB"
        )
    place = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    summary = json.dumps({"device": place, "torch": torch.__version__, "forms": applied, **results})
    (arguments.out / "t5.json").write_text(summary + "\n", encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
