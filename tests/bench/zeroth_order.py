"""What a MeZO step costs beside MeZO's own way of taking it: noise, whole steps and memory, as ratios.

    python tests/bench/zeroth_order.py            # some minutes on one core
    python tests/bench/zeroth_order.py --quick    # few repetitions, a small model

MeZO's way is written down from the paper's algorithms 1 and 2: the weights are perturbed in place by +eps, -2 eps and
+eps, and moved, with normal numbers drawn anew in each of the four passes from a generator that is seeded again. Both
take turns in one process on an OPT of 34M parameters (512 wide, 4 layers, 50,272 tokens) in fp32, and CPU time is
compared; figures are medians. Memory is that of tensors alive at one time during a step, over that of an evaluation.
The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.optim.mezo import Config
from dsso.parallel import noise, noise_cpu
from dsso.parallel.noise import Direction

EPS, LR, TOKENS = 1e-3, 1e-6, 128
CPU = torch.device("cpu")


def model(quick: bool) -> nn.Module:
    """An OPT with random weights."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    width = 64 if quick else 512
    config = OPTConfig(
        vocab_size=1000 if quick else 50272,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=2 if quick else 4,
        ffn_dim=3 * width,
        num_attention_heads=8,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return OPTForCausalLM(config).eval()


def batch(net: nn.Module) -> dict[str, Tensor]:
    """One sequence."""
    config: Any = net.config
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


class Published:
    """The step as the paper writes it down."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.parameters = [p for p in net.parameters() if p.requires_grad]

    @torch.no_grad()
    def pass_(self, seed: int, scale: float) -> None:
        """W <- w + scale z."""
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z

    def noise(self, seed: int) -> None:
        """The four passes of a step, without its evaluations."""
        for scale in (EPS, -2 * EPS, EPS, -LR):
            self.pass_(seed, scale)

    @torch.no_grad()
    def step(self, inputs: dict[str, Tensor], seed: int) -> None:
        """One step."""
        self.pass_(seed, EPS)
        up = self.net(**inputs).loss.item()
        self.pass_(seed, -2 * EPS)
        down = self.net(**inputs).loss.item()
        self.pass_(seed, EPS)
        self.pass_(seed, -LR * (up - down) / (2 * EPS))


class Ours:
    """The same through dsso."""

    def __init__(self, net: nn.Module, kind: noise.Kind) -> None:
        self.net, self.kind = net, kind
        config = Config(lr=LR, eps=EPS, noise=kind)
        self.engine = ForwardEngine(net, make_forward_optimizer(net, "MeZO", config), CPU, 1, 1)
        # As the engine does it: the same room for every copy.
        self.room = torch.empty(max(p.numel() for p in net.parameters()))

    def noise(self, seed: int) -> None:
        """Two perturbed copies of every parameter, and the weights moved."""
        for piece in self.engine._weights.pieces:
            direction = Direction(seed, piece.name, 0, self.kind)
            for scale in (EPS, -EPS):
                noise.add(self.room.narrow(0, 0, piece.base.numel()), piece.base, direction, 0, scale)
            noise.add(piece.base, piece.base, direction, 0, -LR)

    def step(self, inputs: dict[str, Tensor], _seed: int) -> None:
        """One step."""

        def closure() -> Tensor:
            return torch.stack([self.engine(**inputs).loss * (TOKENS - 1), torch.tensor(TOKENS - 1.0)])

        self.engine.step(closure)


def medians(contestants: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """CPU seconds, in turns; the first one does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            begun = time.process_time()
            run(turn)
            if turn:
                seconds[name].append(time.process_time() - begun)
    return {name: median(values) for name, values in seconds.items()}


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def memory(net: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Most bytes of a step over those of an evaluation, weights included; and the largest copy over the weights."""
    ours = Ours(net, "rademacher")
    ours.step(inputs, 0)  # what is checked once is not a step's
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    with torch.no_grad(), Alive() as evaluation:
        net(**inputs)
    with Alive() as step:
        ours.step(inputs, 1)
    ours.engine.close()
    units = [sum(p.numel() for p in layer.parameters()) for layer in net.model.decoder.layers]  # type: ignore[union-attr]
    largest = max(*units, net.get_input_embeddings().weight.numel())  # type: ignore[operator, union-attr]
    return (weights + step.most) / (weights + evaluation.most), 4 * largest / weights


def main() -> None:
    """Measure, print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of a small model: it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    if noise_cpu._library() is None:
        print("no compiler is here: directions are made by torch's own operations")
    repeats = 2 if quick else 7
    nets = {name: model(quick) for name in ("published", "gaussian", "rademacher")}
    inputs = batch(nets["published"])
    published = Published(nets["published"])
    ours = {kind: Ours(nets[kind], kind) for kind in ("gaussian", "rademacher")}
    passes: dict[str, Callable[[int], None]] = {"published": published.noise}
    passes |= {kind: one.noise for kind, one in ours.items()}
    made = medians(passes, repeats)
    steps: dict[str, Callable[[int], None]] = {"published": lambda turn: published.step(inputs, turn)}
    steps |= {kind: lambda turn, one=one: one.step(inputs, turn) for kind, one in ours.items()}
    taken = medians(steps, repeats)
    ratio, largest = memory(model(quick), inputs)
    print(f"{'CPU time, MeZO as published over dsso':40s} gaussian  rademacher")
    for name, found in (("noise and axpy of a step", made), ("whole step at batch 1 x 128", taken)):
        gaussian, signs = (found["published"] / found[kind] for kind in ("gaussian", "rademacher"))
        print(f"{name:40s} {gaussian:8.2f}  {signs:10.2f}")
    print(
        f"memory of a step over an evaluation {ratio:.3f}; the largest part that is copied at a time is"
        f" {largest:.3f} of the weights"
    )
    summary = {
        "noise_gaussian_speedup": made["published"] / made["gaussian"],
        "noise_rademacher_speedup": made["published"] / made["rademacher"],
        "step_speedup_1x128": taken["published"] / taken["rademacher"],
        "step_speedup_1x128_gaussian": taken["published"] / taken["gaussian"],
        "memory_ratio": ratio,
        "largest_copy": largest,
        "quick": quick,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
