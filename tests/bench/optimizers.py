"""What methods on whole matrices cost beside AdamW: the optimizer's step and its state, as ratios.

    python tests/bench/optimizers.py --out runs/bench            # everything; some minutes on one core
    python tests/bench/optimizers.py --out runs/bench --quick    # few steps, to see that it runs

All contestants take turns in one process, step by step, on gradients of their own model, and the CPU time of the
optimizer alone is compared, so that other load on the machine meets them alike. Preconditioners are renewed at every
10th step. A ratio is the mean step of an interval over AdamW's (torch, foreach), the median of several intervals;
`spike` is the slowest place in the interval over the median place. Peers take part where they can be imported. The last
line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
import workload_s as workload  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dsso.engines import make_optimizer  # noqa: E402
from dsso.engines.single import SingleEngine  # noqa: E402
from dsso.optim import resolve  # noqa: E402
from dsso.plots import COLOURS  # noqa: E402
from dsso.results import text_table  # noqa: E402

CPU = torch.device("cpu")
EVERY = 10
WARMUP = 12
OURS: dict[str, dict[str, Any]] = {
    "Shampoo": {"kind": "SHAMPOO"},
    "Shampoo, Newton roots": {"kind": "SHAMPOO", "root": "newton"},
    "Shampoo, blocks of 256": {"kind": "SHAMPOO", "block_side": 256},
    "SOAP": {"kind": "SOAP"},
    "PSGD": {"kind": "PSGD"},
    "PSGD, short sides": {"kind": "PSGD", "aspect": 1.0},
}
Peer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Ours:
    """A contestant of this project."""

    def __init__(self, model: nn.Module, kind: str, **settings: Any) -> None:
        given = {"refresh_interval": [[0, 1], [2, EVERY]], "embeddings": True, "lr": 1e-4, **settings}
        self.model = model
        optimizer = make_optimizer(model, kind, resolve(kind).Config(**given), CPU)
        self.engine = SingleEngine(model, optimizer, CPU, 1, workload.BATCH)
        self.engine.train()

    def step(self, number: int) -> float:
        """Seconds of the optimizer."""
        self.engine.backward(self.engine(number), terms=1)
        begun = time.process_time()
        self.engine.step()
        return time.process_time() - begun

    def state_bytes(self) -> int:
        """Of all state."""
        return self.engine.state_bytes()


class Theirs:
    """An optimizer of torch or of a peer."""

    def __init__(self, model: nn.Module, make: Peer) -> None:
        self.model = model
        self.optimizer = make([p for p in model.parameters() if p.requires_grad])

    def step(self, number: int) -> float:
        """Seconds of the optimizer."""
        self.model(number).backward()
        begun = time.process_time()
        self.optimizer.step()
        seconds = time.process_time() - begun
        self.optimizer.zero_grad()
        return seconds

    def state_bytes(self) -> int:
        """Of all tensors in its state, however deep, each once."""
        seen: dict[int, int] = {}

        def look(value: Any) -> None:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, dict):
                for inner in value.values():
                    look(inner)
            elif isinstance(value, list | tuple):
                for inner in value:
                    look(inner)

        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        look(dict(self.optimizer.state))
        return sum(count for pointer, count in seen.items() if pointer not in weights)


def peers() -> dict[str, Peer]:
    """What can be imported."""
    found: dict[str, Peer] = {}

    def muon(parameters: list[Tensor]) -> torch.optim.Optimizer:
        class Both(torch.optim.Optimizer):
            """Muon on matrices, AdamW on the rest."""

            def __init__(self) -> None:
                super().__init__(parameters, {})
                self.parts = [
                    torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=1e-4),
                    torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=1e-4),
                ]

            def step(self, closure: Any = None) -> None:
                for part in self.parts:
                    part.step()
                    self.state.update(part.state)

        return Both()

    if hasattr(torch.optim, "Muon"):
        found["Muon (torch)"] = muon
    try:
        import pytorch_optimizer as other
    except ImportError:
        pass
    else:
        found["SOAP (pytorch-optimizer)"] = lambda p: other.SOAP(p, lr=1e-4, precondition_frequency=EVERY)
        found["Scalable Shampoo (pytorch-optimizer)"] = lambda p: other.ScalableShampoo(
            p, lr=1e-4, block_size=1024, preconditioning_compute_steps=EVERY, statistics_compute_steps=1
        )
        found["Kron (pytorch-optimizer)"] = lambda p: other.Kron(
            p, lr=1e-4, pre_conditioner_update_probability=1 / EVERY
        )
    try:
        import heavyball
    except ImportError:
        pass
    else:
        heavyball.utils.compile_mode = None
        # Up to version 2 the names are those of the "foreach" forms.
        soap = getattr(heavyball, "ForeachSOAP", None) or heavyball.SOAP
        psgd = getattr(heavyball, "ForeachPSGDKron", None) or heavyball.PSGDKron
        found["SOAP (heavyball)"] = lambda p: soap(p, lr=1e-4, precondition_frequency=EVERY)
        found["PSGD (heavyball)"] = lambda p: psgd(p, lr=1e-4, preconditioner_update_probability=1 / EVERY)
    return found


def race(contestants: dict[str, Any], intervals: int) -> dict[str, list[list[float]]]:
    """Seconds of every step, by contestant and interval; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(WARMUP + intervals * EVERY):
        for name, contestant in contestants.items():
            seconds = contestant.step(number)
            if number >= WARMUP:
                times[name].append(seconds)
    return {
        name: [all_[at : at + EVERY] for at in range(0, len(all_), EVERY)] for name, all_ in times.items()
    }


def judged(name: str, contestants: dict[str, Any], times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Ratios of one contestant."""
    base = median(second for interval in times["AdamW"] for second in interval)
    places = [median(interval[place] for interval in times[name]) for place in range(EVERY)]
    numel = sum(p.numel() for p in contestants[name].model.parameters() if p.requires_grad)
    return {
        "step": median(mean(interval) for interval in times[name]) / base,
        "median_step": median(places) / base,
        "spike": max(places) / median(places),
        "bytes_per_param": contestants[name].state_bytes() / numel,
    }


def two_ranks(kind: str) -> dict[str, float]:
    """A refresh of everything, and the state, on the busier of two ranks over those of one."""
    seconds, kept = {}, {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        model = workload.decoder()
        gradients = []
        for number in range(6):
            # Of several batches: a second moment of one gradient has so small a rank that it is decomposed sooner.
            model.zero_grad()
            model(number).backward()
            gradients.append({n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None})
        taken = []
        for interval in (1, [[0, 1], [1, None]]):
            config = resolve(kind).Config(embeddings=True, refresh_interval=interval)
            method = resolve(kind).Method(config, model, CPU, rank, world_size)
            mine = [{n: g for n, g in one.items() if method.owners.get(n) == rank} for one in gradients]
            found = []
            for step, given in enumerate(mine):
                method.begin_window(step, False)
                method.update(step, torch.tensor(False))
                begun = time.process_time()
                method.precondition(given)
                found.append(time.process_time() - begun)
            taken.append(median(found[1:]))
        # With a refresh and without.
        seconds[rank, world_size] = taken[0] - taken[1]
        kept[rank, world_size] = method.state_bytes()
    return {
        "refresh_speedup_2": seconds[0, 1] / max(seconds[0, 2], seconds[1, 2]),
        "state_ratio_2": max(kept[0, 2], kept[1, 2]) / kept[0, 1],
    }


def draw(lines: dict[str, dict[str, float]], file: Path) -> None:
    """Bars of the mean step, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(lines, key=lambda name: lines[name]["step"], reverse=True)
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    colours = [COLOURS[0] if name in OURS else "#999999" for name in names]
    bars = axis.barh(names, [lines[name]["step"] for name in names], color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axis.set_xlabel("optimizer step over AdamW's, renewed at every 10th step (ours in blue)")
    # From AdamW's on: one contestant that the processor does not suit would hide all others on an even scale.
    axis.set_xscale("log")
    axis.set_xlim(0.8, 2 * max(line["step"] for line in lines.values()))
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figure")
    parser.add_argument("--intervals", type=int, default=5, help="intervals of 10 steps that are timed")
    parser.add_argument("--quick", action="store_true", help="one interval, ours and AdamW alone")
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    intervals = 1 if args.quick else args.intervals

    def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)

    contestants: dict[str, Any] = {"AdamW": Theirs(workload.decoder(), adamw)}
    contestants |= {name: Ours(workload.decoder(), **settings) for name, settings in OURS.items()}
    if not args.quick and not args.without_peers:
        contestants |= {name: Theirs(workload.decoder(), make) for name, make in peers().items()}
    times = race(contestants, intervals)
    lines = {name: judged(name, contestants, times) for name in contestants}

    small: dict[str, Any] = {"AdamW": Theirs(workload.lora(), adamw)}
    small |= {
        name: Ours(workload.lora(), kind)
        for name, kind in (("Shampoo", "SHAMPOO"), ("SOAP", "SOAP"), ("PSGD", "PSGD"))
    }
    small_times = race(small, intervals)
    lora = {name: judged(name, small, small_times) for name in small}
    shared = {
        name: two_ranks(kind) for name, kind in (("Shampoo", "SHAMPOO"), ("SOAP", "SOAP"), ("PSGD", "PSGD"))
    }

    heads = ["workload S, every 10", "mean step", "median place", "slowest/median", "bytes/param"]
    print(
        text_table(
            [heads, *([name, *(f"{value:.2f}" for value in line.values())] for name, line in lines.items())]
        )
    )
    heads[0] = "LoRA shapes, every 10"
    print(
        "\n"
        + text_table([heads, *([name, *(f"{v:.2f}" for v in line.values())] for name, line in lora.items())])
    )
    print(
        "\n"
        + text_table(
            [
                ["two ranks", "refresh, times as fast", "state of the fuller"],
                *(
                    [name, f"{line['refresh_speedup_2']:.2f}", f"{line['state_ratio_2']:.3f}"]
                    for name, line in shared.items()
                ),
            ]
        )
    )
    args.out.mkdir(parents=True, exist_ok=True)
    draw(lines, args.out / "optimizers.png")
    print(f"figure: {args.out / 'optimizers.png'}")
    ours = ("Shampoo", "SOAP", "PSGD")
    last = {
        **{name.lower(): lines[name]["step"] for name in ours},
        "spike": max(lines[name]["spike"] for name in ours),
        "lora_ratio": max(lora[name]["step"] for name in ours),
        "lora_bytes_per_param": max(lora[name]["bytes_per_param"] for name in ours),
        "refresh_speedup_2": min(line["refresh_speedup_2"] for line in shared.values()),
        "state_ratio_2": max(line["state_ratio_2"] for line in shared.values()),
    }
    print(json.dumps({key: round(value, 3) for key, value in last.items()}))
    return last


if __name__ == "__main__":
    main()
