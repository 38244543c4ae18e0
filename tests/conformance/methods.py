"""The methods on gradients as they are found, and a small model to run any of them on."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dsso.curvature.labels import sample_labels
from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim import available, is_forward, resolve

METHODS = tuple(name for name in available() if not is_forward(name))
"""Types of recipes, in capitals."""
CPU = torch.device("cpu")
BATCH = 8


class Net(nn.Module):
    """A convolution, matrices, vectors; a layer that no loss reaches, a frozen one, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv1d(2, 5, 3), nn.Linear(20, 6), nn.Linear(6, 6)
        self.tied, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.tied.weight = self.two.weight
        self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(torch.tanh(self.conv(x)).flatten(1)))
        return self.last(torch.tanh(self.tied(torch.tanh(self.frozen(torch.tanh(self.two(x)))))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same weights every time."""
    torch.manual_seed(0)
    return Net().to(dtype)


def interval_fields(module: ModuleType) -> list[str]:
    """Settings of a method that say how often something is done."""
    return [name for name in module.Config.model_fields if name.endswith("_interval")]


def settings(module: ModuleType, **given: Any) -> dict[str, Any]:
    """Short intervals for whatever a method has, plain SGD for the rest, and what is given."""
    intervals = {name: [[0, 1], [2, 3]] for name in interval_fields(module)}
    return {"lr": 0.01, "base": {"type": "SGD", "momentum": 0.0}, **intervals, **given}


def made(kind: str, model: nn.Module, gas: int = 1, **given: Any) -> SingleEngine:
    """A method on a model, on one device."""
    module = resolve(kind)
    config = module.Config(**settings(module, **given))
    engine = SingleEngine(model, make_optimizer(model, kind, config, CPU), CPU, gas, BATCH // gas)
    engine.train()
    return engine


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eight examples of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 2, 6, generator=generator).to(dtype)
    return x, torch.randint(3, (BATCH,), generator=generator)


def step(engine: SingleEngine, seed: int, scale: float = 1.0) -> None:
    """A whole window, sampled labels where the method asks for them."""
    x, y = batch(seed, next(engine.module.parameters()).dtype)
    count = engine.gradient_accumulation_steps
    parts = list(zip(x.chunk(count), y.chunk(count), range(0, BATCH, BATCH // count), strict=True))

    def at_drawn(logits: Tensor, first: int) -> Tensor:
        """Loss at labels that depend on the seed and on the example's number alone."""
        examples = torch.arange(first, first + len(logits))
        drawn = sample_labels(logits, "cross_entropy", 0, seed, examples, torch.zeros_like(examples))
        return nn.functional.cross_entropy(logits, drawn) * scale

    def sampled(part_x: Tensor, first: int) -> Tensor:
        return at_drawn(engine(part_x), first)

    def batch_of(part_x: Tensor, part_y: Tensor, first: int) -> estimates.MicroBatch:
        return estimates.MicroBatch(
            len(part_x),
            lambda: engine(part_x),
            lambda scores: nn.functional.cross_entropy(scores, part_y) * scale,
            lambda scores: at_drawn(scores, first),
        )

    estimates.run(engine, lambda: [batch_of(*part) for part in parts])
    for part_x, part_y, first in parts:
        engine.backward(nn.functional.cross_entropy(engine(part_x), part_y) * scale, terms=len(part_x))
        if engine.wants_sampled_pass():
            engine.sampled_pass(partial(sampled, part_x, first))
        engine.step()
    estimates.judge(engine, lambda: [batch_of(*part) for part in parts])


def weights(engine: SingleEngine) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}
