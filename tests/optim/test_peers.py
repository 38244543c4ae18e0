"""Independent implementations on identical settings: the same course."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim import shampoo, soap

CPU = torch.device("cpu")
peers = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)]
    return nn.Sequential(*layers)


def loss(model: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """A regression, whose gradients have full rank: what a null direction does is rounding in either code."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    return nn.functional.mse_loss(model(x), y)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def course(kind: str, config: Any, theirs: Callable[[Any], torch.optim.Optimizer]) -> tuple[float, float]:
    """Twenty steps of ours and of theirs: how far theirs went, and how far apart they ended."""
    mine, other, start = net(), net(), weights(net())
    engine = SingleEngine(mine, make_optimizer(mine, kind, config, CPU), CPU, 1, 64)
    engine.train()
    optimizer = theirs(other.parameters())
    for seed in range(20):
        engine.backward(loss(engine, seed), terms=64)
        engine.step()
        loss(other, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((weights(other) - start).norm()), float((weights(mine) - weights(other)).norm())


def test_shampoo_as_it_was_first_published() -> None:
    """Sums instead of averages, roots at every step, no grafting."""
    settings = {"beta1": 0.0, "beta2": 1.0, "epsilon": 1e-4, "epsilon_mode": "absolute", "grafting": "none"}
    config = shampoo.Config(lr=0.05, refresh_interval=1, sides="all", **settings)
    moved, apart = course(
        "SHAMPOO",
        config,
        lambda p: peers.Shampoo(p, lr=0.05, preconditioning_compute_steps=1, matrix_eps=1e-4),
    )
    assert moved > 0.1
    assert apart < 1e-4 * moved


@pytest.mark.parametrize("interval", [1, 3])
def test_soap_as_it_was_published(interval: int) -> None:
    """No ridge, no floor; theirs computes bases in fp32."""
    config = soap.Config(lr=3e-3, refresh_interval=interval, stagger=False, sides="all", ridge=0.0, floor=0.0)
    moved, apart = course(
        "SOAP",
        config,
        lambda p: peers.SOAP(
            p, lr=3e-3, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=interval, eps=1e-8
        ),
    )
    assert moved > 0.1
    assert apart < 1e-4 * moved
