"""Random directions on a GPU against the CPU's, their bandwidth, and MeZO's step on T5-3B against two forward passes.

    python tests/gpu/mezo.py --out runs/gpu                           # T5-3B from its published sizes, random weights
    python tests/gpu/mezo.py --out runs/gpu --device cpu --layers 2 --width 64 --source 16 --elements 5000 # tiny

First, bit by bit: Rademacher directions and stochastic rounding; Gaussian directions to 1e-5. Then the passes over the
weights as shares of the bandwidth of a copy, and time and peak memory of steps in bf16. The last line is one line of
JSON; the exit status is 1 where bits differ or, on a GPU, a target is missed.

Targets with Rademacher directions: a pass has 70 % of the bandwidth of a copy; a step takes 1.10 times two forward
passes; its peak is 1.02 times that of inference, one block and the fp32 master copy. Gaussian ones are only reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from t5 import plain_model  # noqa: E402
from torch import Tensor  # noqa: E402

from dsso.engines import make_forward_optimizer  # noqa: E402
from dsso.engines.forward import ForwardEngine  # noqa: E402
from dsso.engines.units import blocks  # noqa: E402
from dsso.optim.mezo import Config  # noqa: E402
from dsso.parallel import noise, noise_triton  # noqa: E402
from dsso.parallel.noise import Direction, Kind  # noqa: E402
from dsso.parallel.rounding import add_stochastic, round_stochastic  # noqa: E402

KINDS: tuple[Kind, ...] = ("rademacher", "gaussian")
BATCH, TARGET = 16, 32
SHARE, RATIO, MEMORY, GAUSSIAN = 0.70, 1.10, 1.02, 1e-5


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Time of one call: the median of several after two that do not count."""
    found = []
    for _ in range(times + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return median(found[2:])


def agrees(device: torch.device) -> tuple[bool, float]:
    """Whether the device gives the CPU's bits, and the largest error of a normal number."""
    same, worst = True, 0.0
    base = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for start in (0, 1, 128, 77, 2**32 - 3, 2**34 + 77):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for given in (base, base.to(dtype)):
                signs, there, here = Direction(2**63 + 5, "w", 3, "rademacher"), given.to(device), given
                out, wanted = torch.empty_like(there, dtype=dtype), torch.empty_like(here, dtype=dtype)
                tries: list[Callable[[Tensor, Tensor], None]] = [
                    lambda out, of, start=start, signs=signs: noise.add(out, of, signs, start, 1e-3)
                ]
                if dtype != torch.float32:
                    tries += [
                        lambda out, of, start=start, signs=signs: round_stochastic(out, of, signs, start),
                        lambda out, of, start=start, signs=signs: add_stochastic(out, of, signs, start, 1e-3),
                    ]
                for work in tries:
                    work(out, there)
                    work(wanted, here)
                    if not torch.equal(out.cpu(), wanted):
                        same = False
                        print(f"NOT the same bits: start {start}, {given.dtype} to {dtype}", flush=True)
        normal, z = Direction(2**63 + 5, "w", 3, "gaussian"), torch.zeros(100_000, device=device)
        noise.add(z, z, normal, start, 1.0)
        worst = max(worst, float((z.cpu() - noise.sample(normal, start, 100_000)).abs().max()))
    if device.type == "cuda":
        long, signs = 2**31 + 1000, Direction(1, "w", 0, "rademacher")
        out = torch.zeros(long, dtype=torch.bfloat16, device=device)
        noise.add(out, out, signs, 5, 1.0)
        for at in (0, 2**31 - 500, long - 300):
            if not torch.equal(out[at : at + 300].float().cpu(), noise.sample(signs, 5 + at, 300)):
                same = False
                print(f"NOT the same bits: element {at} of {long}", flush=True)
    return same, worst


def passes(device: torch.device, elements: int, times: int) -> dict[str, Any]:
    """Bandwidths of passes over weights, and their shares of that of a copy."""
    weights = torch.randn(elements, device=device).bfloat16()
    other, master = torch.empty_like(weights), weights.float()
    copy = 4 * elements / seconds(lambda: other.copy_(weights), device, times)
    found: dict[str, Any] = {"copy_bytes_s": copy}
    for kind in KINDS:
        z = Direction(1, "w", 0, kind)
        forms: dict[str, tuple[int, Callable[[], None]]] = {
            "bf16": (4, lambda z=z: noise.add(weights, weights, z, 0, 1e-3)),
            "master": (6, lambda z=z: noise.add(other, master, z, 0, 1e-3)),
            "stochastic": (4, lambda z=z: add_stochastic(weights, weights, z, 0, 1e-3)),
        }
        found[kind] = {}
        for name, (size, work) in forms.items():
            speed = size * elements / seconds(work, device, times)
            found[kind][name] = {"bytes_s": speed, "share": speed / copy}
            print(f"{kind:10s} {name:10s} {speed / 1e9:8.1f} GB/s  {speed / copy:6.1%} of a copy", flush=True)
    return found


def peak(device: torch.device) -> int:
    """Of the allocator's memory since it was last asked for; then it starts anew."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def steps(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and memory of steps, and of the two forward passes that they contain."""
    made = plain_model(arguments, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, (BATCH, arguments.source), generator=generator).to(device)
    labels = torch.randint(3, 32000, (BATCH, TARGET), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    terms = torch.tensor(float(labels.numel()), device=device)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return torch.stack([made(**inputs).loss.float() * terms, terms])

    made.eval()
    evaluate()
    gc.collect()
    peak(device)
    forwards = seconds(lambda: (evaluate(), evaluate()), device, arguments.steps)
    inference = peak(device)
    block = max(sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in blocks(made))
    weight = sum(p.numel() * p.element_size() for p in made.parameters())
    found: dict[str, Any] = {}
    for kind in KINDS:
        config = Config(noise=kind)
        engine = ForwardEngine(made, make_forward_optimizer(made, "MeZO", config), device, 1, BATCH)
        engine.step(evaluate)  # it looks twice at the first batch, and kernels are compiled
        peak(device)
        step = seconds(lambda engine=engine: engine.step(evaluate), device, arguments.steps)
        used, master = peak(device), engine.state_bytes()
        found[kind] = {
            "forwards_s": forwards,
            "step_s": step,
            "ratio": step / forwards,
            "inference_bytes": inference,
            "peak_bytes": used,
            "weight_bytes": weight,
            "master_bytes": master,
            "allowed_bytes": MEMORY * inference + block + master,
        }
        print(
            f"{kind:10s} step {step:.4f} s, two forward passes {forwards:.4f} s: {step / forwards:.3f};"
            f" peak {used / 1e9:.2f} GB, inference {inference / 1e9:.2f} GB, master {master / 1e9:.2f} GB,"
            f" block {block / 1e9:.2f} GB",
            flush=True,
        )
        engine.close()
        del engine
        gc.collect()
    return found


def main() -> None:
    """Run all, print, and exit with what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--source", type=int, default=512, help="tokens of an example's source")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    same, error = agrees(device)
    form = (
        "the kernels"
        if cuda and noise_triton.works(device)
        else "torch's own operations"
        if cuda
        else "the CPU"
    )
    print(
        f"by {form}: {'the same bits' if same else 'NOT the same bits'}, Gaussian to {error:.1e}", flush=True
    )
    speed, found = passes(device, arguments.elements, arguments.steps), steps(arguments, device)
    signs = found["rademacher"]
    targets = {
        "a pass over bf16": speed["rademacher"]["bf16"]["share"] >= SHARE,
        "a pass from the master copy": speed["rademacher"]["master"]["share"] >= SHARE,
        "the time of a step": signs["ratio"] <= RATIO,
        "the memory of a step": signs["peak_bytes"] <= signs["allowed_bytes"],
    }
    if cuda:
        for name, met in targets.items():
            print(f"target for {name}: {'met' if met else 'MISSED'}")
    place = torch.cuda.get_device_name() if cuda else "cpu"
    about = {"device": place, "torch": torch.__version__, "gaussian_error": error}
    summary = json.dumps({**about, "passes": speed, "steps": found})
    (arguments.out / "mezo.json").write_text(summary + "\n", encoding="utf-8")
    print(summary, flush=True)
    sys.exit(int(not same or error > GAUSSIAN or (cuda and not all(targets.values()))))


if __name__ == "__main__":
    main()
