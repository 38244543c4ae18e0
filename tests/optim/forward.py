"""A small model for the checks of methods that need only losses, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.optim import resolve

CPU = torch.device("cpu")


class Head(nn.Module):
    """Whose bias is that of its layer as well, as in the heads of masked LMs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, 11)
        self.bias = nn.Parameter(torch.linspace(-0.1, 0.1, 11))
        self.decoder.bias = self.bias

    def forward(self, h: Tensor) -> Tensor:
        return self.decoder(h)


class Net(nn.Module):
    """Blocks, a tied head with a shared bias, a norm, a parameter of the root's own and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=9)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.norm, self.shift = nn.LayerNorm(8), nn.Parameter(torch.tensor([-0.0] + [0.0] * 7))
        self.head = Head(8)
        self.head.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.shift
        for layer in self.layers:
            h = h + layer(h)
        return self.head(self.norm(h))


def made(dtype: torch.dtype = torch.float32, kind: str = "MeZO", **settings: Any) -> ForwardEngine:
    """The model in an engine with a method."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    config = resolve(kind).Config(**settings)
    engine = ForwardEngine(net, make_forward_optimizer(net, kind, config), CPU, 1, 4)
    engine.train()
    return engine


def closure(engine: ForwardEngine, seed: int) -> Callable[[], Tensor]:
    """Evaluates a batch that follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (4, 5), generator=generator)

    def evaluate() -> Tensor:
        logits = engine(ids).double().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids.roll(1).flatten(), reduction="sum")
        return torch.stack([loss, torch.tensor(20.0, dtype=torch.float64)])

    return evaluate


def bits(engine: ForwardEngine) -> dict[str, Tensor]:
    """Copies of the weights as integers."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {n: p.detach().clone().view(kinds[p.dtype]) for n, p in engine.module.named_parameters()}


def kept(engine: ForwardEngine) -> dict[str, Tensor]:
    """State of the method, by parameter and kind."""
    state = engine.optimizer.forward_method.state
    return {f"{name}/{kind}": value for name, kinds in state.items() for kind, value in kinds.items()}
