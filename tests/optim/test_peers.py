"""Independent implementations on identical settings: the same course."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim import shampoo

CPU = torch.device("cpu")
peers = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 5, bias=False)]
    return nn.Sequential(*layers)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 8, generator=generator), torch.randint(5, (64,), generator=generator)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def test_shampoo_as_it_was_first_published() -> None:
    """Sums instead of averages, roots at every step, no grafting."""
    settings = {"beta1": 0.0, "beta2": 1.0, "epsilon": 1e-4, "epsilon_mode": "absolute", "grafting": "none"}
    config = shampoo.Config(lr=0.05, refresh_interval=1, sides="all", **settings)
    ours, theirs, start = net(), net(), weights(net())
    engine = SingleEngine(ours, make_optimizer(ours, "SHAMPOO", config, CPU), CPU, 1, 64)
    engine.train()
    other = peers.Shampoo(theirs.parameters(), lr=0.05, preconditioning_compute_steps=1, matrix_eps=1e-4)
    for seed in range(20):
        x, y = batch(seed)
        engine.backward(nn.functional.cross_entropy(engine(x), y), terms=64)
        engine.step()
        nn.functional.cross_entropy(theirs(x), y).backward()
        other.step()
        other.zero_grad()
    moved = (weights(theirs) - start).norm()
    assert moved > 0.1
    assert (weights(ours) - weights(theirs)).norm() < 1e-4 * moved
