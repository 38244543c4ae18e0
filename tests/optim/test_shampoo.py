"""Shampoo against the published algorithm in float64, and what must hold whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError, RunError
from dsso.linalg import roots
from dsso.optim.shampoo import Config

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"lr": 0.1, "base": {"type": "SGD", "momentum": 0.0}, "refresh_interval": 1}


class Net(nn.Module):
    """A convolution, two matrices and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv1d(2, 5, 3), nn.Linear(20, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.conv(x)).flatten(1))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def made(model: nn.Module, gas: int = 1, **settings: Any) -> SingleEngine:
    config = Config(**{**PLAIN, **settings})
    engine = SingleEngine(model, make_optimizer(model, "SHAMPOO", config, CPU), CPU, gas, 8)
    engine.train()
    return engine


def step(engine: SingleEngine, seed: int, scale: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    x, y = batch(seed, dtype)
    count = engine.gradient_accumulation_steps
    for part_x, part_y in zip(x.chunk(count), y.chunk(count), strict=True):
        loss = nn.functional.cross_entropy(engine(part_x), part_y) * scale
        engine.backward(loss, terms=len(part_x))
        engine.step()


def weights(engine: SingleEngine) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def root(x: Tensor, power: float, epsilon: float) -> Tensor:
    w, v = torch.linalg.eigh(x + epsilon * x.trace() * torch.eye(len(x)).double())
    return v * w.pow(-power) @ v.mT


def twin(
    steps: int, kept: Callable[[tuple[int, ...]], tuple[int, ...]], **settings: Any
) -> dict[str, Tensor]:
    """The algorithm written down for whole tensors."""
    c = Config(**{**PLAIN, **settings})
    model = net()
    sums: dict[str, list[Tensor]] = {}
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for t in range(1, steps + 1):
        x, y = batch(t - 1)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad
                assert g is not None
                if p.dim() < 2:
                    p -= c.lr * g
                    continue
                g = g.view(5, 6) if p.dim() == 3 else g  # 2 and 3 merge into 6
                dims = kept(tuple(g.shape))
                new = c.beta2 if c.beta2 < 1 else 1.0
                fresh = 1 - c.beta2 if c.beta2 < 1 else 1.0
                grams = [g @ g.mT if dim == 0 else g.mT @ g for dim in dims]
                old = sums.get(name, [torch.zeros_like(gram) for gram in grams])
                sums[name] = [new * s + fresh * gram for s, gram in zip(old, grams, strict=True)]
                means[name] = c.beta1 * means.get(name, torch.zeros_like(g)) + (1 - c.beta1) * g
                keep = 1.0 if c.grafting == "adagrad" else new
                add = 1.0 if c.grafting == "adagrad" else fresh
                squares[name] = keep * squares.get(name, torch.zeros_like(g)) + add * g**2
                bias = 1 - c.beta2**t if c.beta2 < 1 else 1.0
                m = means[name] / (1 - c.beta1**t)
                v = squares[name] if c.grafting == "adagrad" else squares[name] / bias
                u = m
                for s, dim in zip(sums[name], dims, strict=True):
                    r = root(s / bias, c.exponent or 1 / (2 * len(dims)), c.epsilon)
                    u = r @ u if dim == 0 else u @ r
                graft = {
                    "none": None,
                    "sgd": m,
                    "adam": m / (v.sqrt() + c.grafting_epsilon),
                    "rmsprop": g / (v.sqrt() + c.grafting_epsilon),
                    "adagrad": g / (v.sqrt() + c.grafting_epsilon),
                }[c.grafting]
                if graft is not None:
                    u = u * graft.norm() / u.norm()
                    u = graft if t <= c.start_step else u
                p -= c.lr * u.reshape(p.shape)
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"grafting": "none", "epsilon": 1e-3},
        {"grafting": "none", "beta1": 0.0, "beta2": 1.0, "epsilon": 1e-3},
        {"grafting": "sgd"},
        {"grafting": "adam", "start_step": 2},
        {"grafting": "rmsprop", "exponent": 0.5},
        {"grafting": "adagrad", "root": "newton", "epsilon": 1e-2},
    ],
)
def test_the_equations(settings: dict[str, Any]) -> None:
    settings = {"sides": "all", "lr": 0.01, **settings}
    engine = made(net(), **settings)
    for seed in range(6):
        step(engine, seed)
    wanted = twin(6, lambda shape: tuple(range(len(shape))), **settings)
    tolerance = 1e-5 if settings.get("root") == "newton" else 1e-9
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance)


def test_of_a_long_block_the_short_side_is_preconditioned() -> None:
    engine = made(net(), aspect=3.0, grafting="none", epsilon=1e-2)
    for seed in range(4):
        step(engine, seed)
    wanted = twin(
        4,
        lambda shape: tuple(d for d, side in enumerate(shape) if side <= 3 * min(shape)),
        grafting="none",
        epsilon=1e-2,
    )
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)
    # 20 inputs beside 6 outputs: no square of 20 is kept.
    assert all(side.shape != (20, 20) for side in engine.optimizer.method.state_tensors().values())


def test_blocks_are_preconditioned_one_by_one() -> None:
    """As if each were a parameter of its own."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.zeros(3, 4).double()) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            rows = [
                torch.cat([self.parts[0], self.parts[1]], 1),
                torch.cat([self.parts[2], self.parts[3]], 1),
            ]
            return x @ torch.cat(rows).mT

    whole = nn.Linear(8, 6, bias=False).double()
    pieces = Cut()
    with torch.no_grad():
        for index, part in enumerate(pieces.parts):
            part.copy_(whole.weight[3 * (index // 2) :, 4 * (index % 2) :][:3, :4])
    engines = [made(whole, block_side=4, epsilon=1e-2), made(pieces, epsilon=1e-2)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(9, 8, generator=generator).double(), torch.randint(6, (9,), generator=generator)
        for engine in engines:
            engine.backward(nn.functional.cross_entropy(engine(x), y), terms=9)
            engine.step()
    torch.testing.assert_close(pieces(torch.eye(8).double()), whole(torch.eye(8).double()))


@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_a_checkpoint_of_other_settings_is_refused(grafting: str, tmp_path: Path) -> None:
    settings = {"refresh_interval": 3, "grafting": grafting}
    engine = made(net(torch.float32), **settings)
    step(engine, 0)
    engine.save_checkpoint(tmp_path, "here", {})
    with pytest.raises(RunError, match=r"(?s)(another shape|lacks state).*block_side"):
        made(net(torch.float32), **settings, block_side=3).load_checkpoint(tmp_path, "here")
    if grafting == "none":
        with pytest.raises(RunError, match="lacks state of the method"):
            made(net(torch.float32), **{**settings, "grafting": "adam"}).load_checkpoint(tmp_path, "here")


def test_a_failed_root_keeps_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(net(torch.float32))
    step(engine, 0)
    good = engine.optimizer.method.state_tensors()["one.weight/0/root0"].clone()
    monkeypatch.setattr(roots, "eigh", lambda x: (x.diagonal(), x, True))
    step(engine, 1)
    assert torch.equal(engine.optimizer.method.state_tensors()["one.weight/0/root0"], good)
    assert engine.health()["factor_failures"] == 3
    assert engine.health()["layers_without_factors"] == 0
    monkeypatch.undo()
    step(engine, 2)
    assert not torch.equal(engine.optimizer.method.state_tensors()["one.weight/0/root0"], good)


def test_refreshes_are_spread_over_their_interval() -> None:
    engine = made(net(torch.float32), refresh_interval=[[0, 1], [2, 3]], block_side=7)
    ages = []
    for seed in range(8):
        step(engine, seed)
        owned = engine.optimizer.method.counters()["owned"].values()
        ages.append(sum(one["refreshed_at"] == seed for one in owned))
    total = len(engine.optimizer.method.counters()["owned"])
    assert ages[:2] == [total] * 2
    assert sum(ages[2:5]) == sum(ages[5:8]) == total
    assert max(ages[2:]) < total


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta2": 0.0}, "greater than 0"),
        ({"epsilon": 0.0}, "greater than 0"),
        ({"root": "newton", "exponent": 0.3}, "whole number"),
        ({"grafting": "lion"}, "Input should be"),
        ({"block_side": 1}, "greater than or equal to 2"),
        ({"refresh_interval": 0}, "interval"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Config(**settings)


def test_a_model_without_a_matrix_is_refused() -> None:
    with pytest.raises(RecipeError, match="no matrix for this method"):
        made(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), exclude=["0"])


def test_it_learns_faster_than_the_gradient() -> None:
    """On a badly scaled regression, with the length of the gradient's own step."""
    losses = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=generator) * torch.logspace(0, -2, 12)
    y = x @ torch.randn(12, 4, generator=generator) * torch.logspace(0, -1, 4)
    for grafting in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(12, 4, bias=False)
        settings = {"grafting": "sgd", "beta1": 0.0, "start_step": 0 if grafting else 1000}
        engine = made(model, lr=0.5, **settings)
        for _ in range(60):
            loss = nn.functional.mse_loss(engine(x), y)
            engine.backward(loss, terms=64)
            engine.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.5 * losses[1]
