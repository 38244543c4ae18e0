"""Baselines through dsso's optimizer against torch's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.recipe_models import BASELINES

CPU = torch.device("cpu")
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    (
        "Adam",
        {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": True},
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    ("SGD", {"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    (
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    (
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
]


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "params", "theirs"), CASES, ids=lambda v: str(v) if not callable(v) else "torch"
)
def test_same_trajectory_as_torch(kind: str, params: dict[str, Any], theirs: Any, clip: float) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        # No bias: torch decays biases, dsso does not.
        models.append(nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)))
    ours = SingleEngine(
        models[0], make_optimizer(models[0], kind, BASELINES[kind](**params), CPU, clip), CPU, 1, 8
    )
    reference = theirs(models[1].parameters())
    generator = torch.Generator().manual_seed(1)
    ours.train()
    for _ in range(20):
        x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        ours.backward(nn.functional.cross_entropy(ours(x), y))
        ours.step()
        reference.zero_grad()
        nn.functional.cross_entropy(models[1](x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(models[1].parameters(), clip)
        reference.step()
    for mine, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-4, atol=2e-6)
