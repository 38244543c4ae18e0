"""A small net whose Gauss-Newton matrix is known in full, and steps on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim.gauss_newton import Config

CPU = torch.device("cpu")
WIDE, CLASSES, COUNT = 4, 3, 12


def model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDE, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, CLASSES)]
    return nn.Sequential(*layers).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, WIDE, generator=generator).double(), torch.randint(
        CLASSES, (COUNT,), generator=generator
    )


def made(net: nn.Module, gas: int = 1, **given: Any) -> SingleEngine:
    config = Config(**{"lr": 1.0, "clip": "none", "tolerance": 0.0, "iterations": 60, **given})
    engine = SingleEngine(net, make_optimizer(net, "GAUSS_NEWTON", config, CPU), CPU, gas, COUNT // gas)
    engine.train()
    return engine


def labels(x: Tensor, scores: Tensor) -> Tensor:
    """Drawn, for the test: always the second best."""
    return scores.topk(2).indices[:, 1]


def step(engine: SingleEngine, seed: int, scale: float = 1.0) -> None:
    gas = engine.gradient_accumulation_steps
    parts = list(zip(*(one.chunk(gas) for one in data(seed)), strict=True))
    terms = COUNT / gas

    def batch(x: Tensor, y: Tensor) -> estimates.MicroBatch:
        def loss(scores: Tensor, wanted: Tensor) -> Tensor:
            return nn.functional.cross_entropy(scores, wanted, reduction="sum") * scale / terms

        return estimates.MicroBatch(
            terms, lambda: engine(x), lambda s: loss(s, y), lambda s: loss(s, labels(x, s.detach()))
        )

    estimates.run(engine, lambda: [batch(*part) for part in parts])
    for part in parts:
        one = batch(*part)
        engine.backward(one.loss(one.scores()), terms=terms)
        engine.step()


def dense(net: nn.Module, seed: int, sampled: bool = False) -> tuple[Tensor, Tensor]:
    """Gradient [P] and Gauss-Newton matrix [P, P] of the mean loss."""
    x, y = data(seed)
    parameters = list(net.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters)).double()
    matrix = torch.zeros(len(total), len(total)).double()

    def flat(grads: Any) -> Tensor:
        return torch.cat([g.flatten() for g in grads])

    for row, label in zip(x, y, strict=True):
        f = net(row)
        j = torch.stack([flat(torch.autograd.grad(z, parameters, retain_graph=True)) for z in f])
        p = f.detach().softmax(-1)
        bent = torch.diag(p) - torch.outer(p, p)
        if sampled:
            s = p - nn.functional.one_hot(labels(row[None], f.detach()[None])[0], CLASSES)
            bent = torch.outer(s, s)
        matrix += j.mT @ bent @ j / COUNT
        total += flat(torch.autograd.grad(nn.functional.cross_entropy(f, label), parameters)) / COUNT
    return total, matrix


def moved(engine: SingleEngine, act: Callable[[], None]) -> Tensor:
    before = [p.detach().clone() for p in engine.module.parameters()]
    act()
    pairs = zip(before, engine.module.parameters(), strict=True)
    return torch.cat([(old - new.detach()).flatten() for old, new in pairs])
