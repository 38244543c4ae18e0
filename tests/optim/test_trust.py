"""Damping that follows how far steps can be trusted, against dense quadratic models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError, RunError
from dsso.optim import resolve
from dsso.recipe import load_recipe
from tests.conformance.methods import METHODS, made, net, step, weights
from tests.plan.cases import other, recipe

CPU = torch.device("cpu")
COUNT = 8
DAMPED = tuple(kind for kind in METHODS if resolve(kind).Config.damped)
SQUARES = "squares"


def engine_of(kind: str, model: nn.Module, gas: int = 1, **given: Any) -> SingleEngine:
    own = {"interval": 1, "rate": 0.5, **given.pop("trust", {})}
    config = resolve(kind).Config(**{"lr": 0.1, "clip": "none", "adaptive_damping": own, **given})
    engine = SingleEngine(model, make_optimizer(model, kind, config, CPU), CPU, gas, COUNT // gas)
    engine.train()
    return engine


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, 4, generator=generator).double(), torch.randn(
        COUNT, 3, generator=generator
    ).double()


def loss_of(scores: Tensor, target: Tensor) -> Tensor:
    return (scores - target).square().sum()


def take(engine: SingleEngine, seed: int, judged: bool = True, scale: float = 1.0) -> None:
    """One step on squared errors, whose predictions are drawn nowhere."""
    gas = engine.gradient_accumulation_steps
    terms = COUNT / gas

    def batch(x: Tensor, y: Tensor) -> estimates.MicroBatch:
        def loss(scores: Tensor) -> Tensor:
            return loss_of(scores, y) * scale / terms

        return estimates.MicroBatch(terms, lambda: engine(x), loss, loss)

    every = [batch(x, y) for x, y in zip(*(one.chunk(gas) for one in data(seed)), strict=True)]
    estimates.run(engine, lambda: every)
    for one in every:
        engine.backward(one.loss(one.scores()), terms=terms)
        engine.step()
    if judged:
        estimates.judge(engine, lambda: every)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double()


def curved() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("kind", DAMPED)
def test_where_the_model_is_the_loss_damping_falls(kind: str) -> None:
    engine = engine_of(kind, linear(), trust={"least": 0.1})
    for seed in range(6):
        take(engine, seed)
    health = engine.health()
    assert health["reduction_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert health["damping_factor"] == 0.1
    assert 0.5**3 > 0.1 > 0.5**4


def dense(model: nn.Module, before: list[Tensor], after: list[Tensor], seed: int) -> tuple[float, float]:
    """Rho from the whole Gauss-Newton matrix, and what it is over."""
    x, y = data(seed)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in before]

    def scores(flat: Tensor) -> Tensor:
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), before, strict=True)]
        whole: Tensor = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return whole

    w, now = (torch.cat([p.flatten() for p in one]) for one in (before, after))
    d = now - w
    t = torch.autograd.functional.jacobian(lambda v: scores(v).reshape(-1), w) @ d
    g = torch.autograd.functional.jacobian(lambda v: loss_of(scores(v), y) / COUNT, w)
    change = (loss_of(scores(now), y) - loss_of(scores(w), y)) / COUNT
    predicted = g @ d + (t @ t) / COUNT
    return float(change / predicted), float(predicted)


@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize("kind", DAMPED)
@pytest.mark.parametrize("lr", [0.1, 2.0])
def test_the_ratio_is_that_of_the_dense_model(kind: str, lr: float, gas: int) -> None:
    model = curved()
    engine = engine_of(kind, model, gas, lr=lr, momentum=0.5, weight_decay=0.01)
    factor = 1.0
    for seed in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        take(engine, seed)
        ratio, predicted = dense(model, before, [p.detach().clone() for p in model.parameters()], seed)
        engine.optimizer.begin_window()  # as the next step's first pass does
        health = engine.health()
        assert health["reduction_ratio"] == pytest.approx(ratio, rel=1e-3, abs=1e-6)
        factor *= 2.0 if predicted > 0 or ratio < 0.25 else 0.5 if ratio > 0.75 else 1.0
        assert health["damping_factor"] == factor
        engine.optimizer.method.damping_factor = 1.0  # type: ignore[union-attr]


def test_steps_that_go_too_far_raise_it() -> None:
    engine = engine_of("GAUSS_NEWTON", curved(), lr=50.0, trust={"most": 4.0})
    for seed in range(5):
        take(engine, seed)
    assert engine.health()["damping_factor"] == 4.0


def test_the_factor_acts_on_the_damping() -> None:
    plain, followed = engine_of("KFAC", linear(), trust={"rate": 0.999999}), engine_of("KFAC", linear())
    for seed in range(4):
        take(plain, seed)
        take(followed, seed)
    assert followed.health()["damping"] == pytest.approx(plain.health()["damping"] / 8, rel=1e-3)


def test_only_every_so_many_steps_are_judged() -> None:
    engine = engine_of("KFAC", linear(), trust={"interval": 3})
    wanted = []
    for seed in range(7):
        take(engine, seed, judged=False)
        wanted.append(engine.wants_judgement)
        if engine.wants_judgement:
            estimates.judge(engine, lambda: [])
    assert wanted == [False, False, True] * 2 + [False]


def test_a_batch_that_is_not_finite_says_nothing() -> None:
    engine = engine_of("KFAC", linear())
    take(engine, 0)
    take(engine, 1, scale=math.nan)
    take(engine, 2)
    assert engine.health()["damping_factor"] == 0.5
    assert engine.health()["skipped_steps"] == 1


def test_a_loop_that_leaves_it_out_is_told() -> None:
    engine = engine_of("KFAC", linear())
    take(engine, 0, judged=False)
    with pytest.raises(RunError, match=r"step 0 was not judged.*\n.*estimates\.judge"):
        take(engine, 1)


@pytest.mark.parametrize("kind", DAMPED)
def test_a_checkpoint_between_judgements_goes_on_exactly(kind: str, tmp_path: Any) -> None:
    given = {"adaptive_damping": {"interval": 2, "rate": 0.5}, "lr": 0.3}
    straight, resumed = made(kind, net(), **given), made(kind, net(), **given)
    for seed in range(9):
        if seed == 4:  # the step before has been judged, and what it said is not read yet
            straight.save_checkpoint(tmp_path, "here", {})
            resumed.load_checkpoint(tmp_path, "here")
        step(straight, seed)
        if seed >= 4:
            step(resumed, seed)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())
    assert resumed.health()["damping_factor"] == straight.health()["damping_factor"] != 1.0


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind not in DAMPED])
def test_methods_without_a_damped_curvature_refuse_it(kind: str) -> None:
    with pytest.raises(
        RecipeError, match="adaptive_damping means nothing to a method without a damped curvature"
    ):
        load_recipe(other(kind, recipe("zero-2"), adaptive_damping={}))


def test_rounded_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"adaptive_damping: what a step does to the loss is lost"):
        load_recipe(recipe("zero-2", "bf16", params={"adaptive_damping": {}}))
