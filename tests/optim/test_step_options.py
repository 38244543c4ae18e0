"""What the contract adds to any method: a bound that follows the norms, and first steps of first order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dsso.clip import NormQuantile
from dsso.diagnostics import NoopWatch
from dsso.optim import shampoo
from tests.conformance.methods import METHODS, batch, made, net, step, weights


def test_the_bound_is_a_quantile_of_the_last_steps() -> None:
    follower = NormQuantile(0.5, 4, 2.0)
    norms = [5.0, 1.0, 3.0, 2.0, 100.0, 4.0]
    good = torch.tensor(False)
    bounds = []
    for at, norm in enumerate(norms):
        bounds.append(float(follower.bound(7.0)))
        follower.note(at, torch.tensor(norm), good)
    # 7 until four are known; then twice the median of the last four.
    assert bounds == [7.0, 7.0, 7.0, 7.0, 5.0, 5.0]
    # A step that is dropped is not looked at.
    before = follower.state()
    follower.note(6, torch.tensor(float("nan")), torch.tensor(True))
    assert follower.state() == before
    other = NormQuantile(0.5, 4, 2.0)
    other.load(before)
    assert float(other.bound(7.0)) == float(follower.bound(7.0))
    shorter = NormQuantile(0.5, 3, 2.0)
    shorter.load(before)
    assert float(shorter.bound(7.0)) == 7.0


def test_a_spike_is_clipped_to_what_was_usual() -> None:
    """Without anyone having told how long a step is."""
    kind = "SHAMPOO"
    common = {"lr": 1.0, "clip": "post", "tau": 1e9, "grafting": "none", "beta1": 0.0}
    engine = made(kind, net(), **common, adaptive_tau={"window": 5, "quantile": 0.5})
    usual = []
    for seed in range(8):
        step(engine, seed % 2, scale=1e-3)
        usual.append(engine.health()["update_norm"])
    tau = engine.health()["tau"]
    assert sorted(usual[-6:])[0] <= tau <= sorted(usual[-6:])[-1]
    before = weights(engine)
    step(engine, 1, scale=1e3)
    health = engine.health()
    assert health["update_norm"] > 3 * health["tau"]
    moved = sum((value - before[name]).square().sum() for name, value in weights(engine).items()) ** 0.5
    assert float(moved) == pytest.approx(health["tau"], rel=1e-3)
    assert health["clip_scale"] == pytest.approx(health["tau"] / health["update_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_first_steps_go_along_the_gradient(kind: str) -> None:
    engine = made(kind, net(), warmup_steps=3, warmup_scale=0.5, clip="none", momentum=0.0, lr=0.1)
    for seed in range(5):
        before = weights(engine)
        step(engine, seed)
        taken = {*engine.optimizer.method.owners, *getattr(engine.optimizer.method, "taken", ())}
        x, y = batch(seed, torch.float32)
        other = net()
        other.load_state_dict(
            {name: before.get(name, before.get("two.weight")) for name in other.state_dict()}
        )
        torch.nn.functional.cross_entropy(other(x), y).backward()
        for name, p in other.named_parameters():
            if p.grad is None or name not in taken:
                continue
            change = weights(engine)[name] - before[name]
            first_order = torch.allclose(change, -0.05 * p.grad, rtol=1e-4, atol=1e-6)
            assert first_order == (seed < 3) or float(p.grad.abs().max()) == 0, (name, seed)
    assert engine.health()["layers_without_factors"] <= 2  # what no loss reaches


def test_lengths_of_first_steps_are_not_looked_at() -> None:
    """A gradient is as long as it is; the bound is for the steps of the method."""
    engine = made("KFAC", net(), warmup_steps=4, tau=7.0, adaptive_tau={"window": 3, "quantile": 0.5})
    told = []
    for seed in range(9):
        step(engine, seed)
        told.append(engine.health()["tau"])
    assert told[:7] == [7.0] * 7
    assert 7.0 not in told[7:]


def test_steps_that_were_asked_for_are_no_reason_to_warn() -> None:
    watch = NoopWatch(5, "KFAC", {"warmup_steps": 20})
    assert all(watch.update(at, {"cos_update_grad": 1.0}) is None for at in range(1, 21))
    told = [watch.update(at, {"cos_update_grad": 1.0}) for at in range(21, 30)]
    assert [line is not None for line in told].index(True) == 4


def test_a_bound_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="adaptive_tau bounds nothing with clip = none"):
        shampoo.Config(clip="none", adaptive_tau={})
    with pytest.raises(ValidationError, match="less than 1"):
        shampoo.Config(clip="post", adaptive_tau={"quantile": 1.0})
