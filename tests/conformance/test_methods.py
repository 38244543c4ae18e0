"""What every method on gradients must do, whatever it computes; a new file of `dsso/optim/` is found by itself.

That the step does not depend on engine, stage, number of ranks, accumulation and checkpointing is checked in
`tests/dist`, the equations of a method in its own file of `tests/optim`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dsso.errors import RecipeError
from dsso.optim import resolve
from dsso.optim.base import GradientMethod
from dsso.recipe import load_recipe
from tests.conformance import pages
from tests.conformance.methods import METHODS, interval_fields, made, net, settings, step, weights
from tests.house.files import ROOT
from tests.plan.cases import on_meta, other, planned, recipe

every_method = pytest.mark.parametrize("kind", METHODS)
every_option = pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": "post", "adaptive_tau": {"window": 4, "quantile": 0.5}},
        {"warmup_steps": 3, "clip": "pre", "tau": 0.5},
    ],
    ids=["plain", "adaptive", "warmup"],
)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def state(engine: object) -> dict[str, Tensor]:
    method: GradientMethod = engine.optimizer.method  # type: ignore[attr-defined]
    return {name: tensor.clone() for name, tensor in method.state_tensors().items()}


@every_option
@every_method
def test_accumulated_micro_batches_equal_one_batch(kind: str, options: dict[str, Any]) -> None:
    one, four = made(kind, net(torch.float64), **options), made(kind, net(torch.float64), gas=4, **options)
    before = weights(one)
    for seed in range(6):
        step(one, seed)
        step(four, seed)
    assert not same(weights(one), before)
    # Sampled labels are drawn micro-batch by micro-batch: then nothing but the draw differs.
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(four)[name], value, rtol=1e-8, atol=1e-8)


@every_option
@every_method
def test_a_checkpoint_within_an_interval_goes_on_exactly(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    straight, resumed = made(kind, net(), **options), made(kind, net(), **options)
    for seed in range(10):
        if seed == 6:
            straight.save_checkpoint(tmp_path, "here", {})
            resumed.load_checkpoint(tmp_path, "here")
        step(straight, seed)
        if seed >= 6:
            step(resumed, seed)
    assert same(weights(resumed), weights(straight))
    assert same(state(resumed), state(straight))
    assert resumed.health() == straight.health()


@every_method
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, at: int) -> None:
    always = dict.fromkeys(interval_fields(resolve(kind)), 1)
    engine, undisturbed = made(kind, net(), **always), made(kind, net(), **always)
    for seed in range(at):
        step(engine, seed)
        step(undisturbed, seed)
    before = weights(engine)
    step(engine, 100, scale=float("nan"))
    assert same(weights(engine), before)
    assert all(tensor.isfinite().all() for tensor in state(engine).values())
    assert engine.health()["skipped_steps"] == 1
    for seed in range(at, at + 4):
        step(engine, seed)
        step(undisturbed, seed)
    assert not same(weights(engine), before)
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(engine)[name], value, rtol=1e-6, atol=1e-7)
    assert engine.health()["layers_without_factors"] == undisturbed.health()["layers_without_factors"]


@every_method
def test_no_gradient_is_no_step(kind: str) -> None:
    engine = made(kind, net())
    before = weights(engine)
    for seed in range(3):
        step(engine, seed, scale=0.0)
    assert same(weights(engine), before)
    assert engine.health()["update_norm"] == 0


@every_method
@pytest.mark.parametrize("tau", [0.01, 2.0])
def test_the_length_of_a_step_is_bounded(kind: str, tau: float) -> None:
    engine = made(kind, net(), lr=1.0, momentum=0.0, clip="post", tau=tau)
    for seed in range(4):
        before = weights(engine)
        step(engine, seed)
        moved = sum((value - before[name]).square().sum() for name, value in weights(engine).items())
        assert moved**0.5 <= tau * 1.001


@every_method
def test_bf16_stays_finite(kind: str) -> None:
    engine = made(kind, net(torch.bfloat16), lr=0.05)
    before = weights(engine)
    for seed in range(6):
        step(engine, seed)
    assert all(value.isfinite().all() for value in weights(engine).values())
    assert all(tensor.isfinite().all() for tensor in state(engine).values())
    assert not same(weights(engine), before)


@every_method
def test_frozen_unused_and_tied(kind: str) -> None:
    """What is frozen or reached by no loss stays, and nothing waits for it; what is tied moves once."""
    engine = made(kind, net())
    before = weights(engine)
    for seed in range(4):
        step(engine, seed)
    after = weights(engine)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {
        name for name in before if not name.startswith(("frozen", "unused")) and name != "tied.weight"
    }
    assert engine.module.tied.weight is engine.module.two.weight
    rows = {row["parameter"] for row in engine.table()}
    assert rows == {name for name in before if not name.startswith("frozen")}


@every_method
def test_its_state_has_a_name_and_is_counted(kind: str) -> None:
    engine = made(kind, net())
    for seed in range(2):
        step(engine, seed)
    method = engine.optimizer.method
    tensors = method.state_tensors()
    # What an elementwise method keeps lies with the optimizer's moments.
    beside = [one for rule in engine.optimizer.rules.values() for one in rule.kept]
    assert tensors or beside
    assert all(one in state for state in engine.optimizer.state.values() for one in beside)
    assert all(method.wants(name) for name in tensors)
    assert method.state_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    json.dumps(method.counters())


@every_method
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_plan_counts_its_bytes(kind: str, world_size: int) -> None:
    raw = other(kind, recipe("ddp", model="tiny-t5"))
    raw["optimizer"]["params"] = {"lr": 1e-3}
    written = load_recipe(raw)
    found = planned(raw, world_size)
    for rank in range(world_size):
        model = on_meta(written).to_empty(device="cpu")
        method = resolve(kind).Method(written.optimizer_config, model, torch.device("cpu"), rank, world_size)
        assert found.ranks[rank].factors == method.state_bytes()
        method.close()


@every_method
def test_settings_that_are_refused(kind: str) -> None:
    module = resolve(kind)
    for given, told in (
        ({"lr": 0.0}, "greater than 0"),
        ({"tau": -1.0}, "tau"),
        ({"clip": "x"}, "Input should"),
    ):
        with pytest.raises(ValidationError, match=told):
            module.Config(**settings(module, **given))
    raw = other(kind, recipe("ddp", model="tiny-t5"))
    raw["optimizer"]["params"] = {"momentun": 0.5}
    with pytest.raises(RecipeError, match=r"(?s)optimizer.params.momentun: unknown key.*nearest: 'momentum'"):
        load_recipe(raw)


@every_method
def test_it_is_documented_and_has_recipes(kind: str) -> None:
    pages.check(kind)
    name = kind.lower()
    assert list(ROOT.glob(f"tests/optim/test_{name}*.py")), "its equations"
