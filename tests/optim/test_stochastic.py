"""Weights of 16 bits that are stepped themselves: small steps survive on average, and nothing is kept beside them."""

from __future__ import annotations

import pytest
import torch

from dsso.optim._probes import Piece
from dsso.optim.mezo import Config, Method
from dsso.parallel import noise
from tests.optim.forward import bits, closure, kept, made

TYPES = [torch.bfloat16, torch.float16]
ZO = {"MeZO": {}, "ZO_Adam": {}, "ZO_AdaMM": {}, "ZO_AdaMU": {"t3": 9}, "HiZOO": {}}


def piece(dtype: torch.dtype, decayed: bool = False) -> Piece:
    return Piece("w", 7, torch.ones(40_000, dtype=dtype), decayed)


@pytest.mark.parametrize("dtype", TYPES)
def test_changes_below_half_a_unit_add_up(dtype: torch.dtype) -> None:
    method, one = Method(Config(rounding="stochastic")), piece(dtype)
    for step in range(200):
        for at in (0, 30_000):
            length = 30_000 if not at else 10_000
            method.move(one, at, torch.full((length,), 2e-4), step)
    # 200 roundings of one unit (2^-7 or 2^-10) at most: the mean of 40,000 is known to better than a thousandth.
    assert float(one.base.double().mean()) == pytest.approx(1.04, abs=1e-3)
    nearest = torch.ones(1, dtype=dtype)
    assert float(nearest.add_(torch.tensor([2e-4]))) == 1.0


@pytest.mark.parametrize("dtype", TYPES)
def test_decay_below_half_a_unit_adds_up(dtype: torch.dtype) -> None:
    method = Method(Config(rounding="stochastic", weight_decay=0.1))
    shrunk, left = piece(dtype, decayed=True), piece(dtype)
    for step in range(200):
        method.shrink(shrunk, step, 1e-3)
        method.shrink(left, step, 1e-3)
    assert float(shrunk.base.double().mean()) == pytest.approx((1 - 1e-4) ** 200, abs=1e-3)
    assert bool((left.base == 1).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_steps_of_mezo_below_half_a_unit_add_up(dtype: torch.dtype) -> None:
    method, one = Method(Config(rounding="stochastic", noise="rademacher")), piece(dtype)
    wanted = torch.ones(40_000, dtype=torch.float64)
    for step in range(100):
        method.update([one], torch.tensor([[1.0, 1.0], [0.5, 1.0]], dtype=torch.float64), step, 4e-4)
        for stream, slope in enumerate((1.0, 0.5)):
            z = noise.sample(method.direction("w", stream, step), 7, 40_000)
            wanted -= 2e-4 * slope * z.double()
    error = one.base.double() - wanted
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    # A rounding errs with a variance of at most the change times the unit.
    deviation = (100 * (2e-4 + 1e-4) * unit / 40_000) ** 0.5
    assert abs(float(error.mean())) < 5 * deviation
    # What is wanted shows in what is there, which rounding to the nearest would have left at one.
    moved = (one.base.double() - 1) @ (wanted - 1) / ((wanted - 1) @ (wanted - 1))
    assert float(moved) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", ZO)
def test_no_copy_is_kept_and_steps_are_taken(kind: str) -> None:
    engine = made(torch.bfloat16, kind, lr=1e-3, rounding="stochastic", **ZO[kind])
    before = bits(engine)
    for step in range(3):
        engine.step(closure(engine, step))
    assert engine.state_bytes() == sum(value.numel() * 4 for value in kept(engine).values())
    after = bits(engine)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.isfinite(p).all() for p in engine.module.parameters())


@pytest.mark.parametrize("kind", ZO)
def test_steps_of_no_length_change_no_bit(kind: str) -> None:
    engine = made(torch.bfloat16, kind, rounding="stochastic", **ZO[kind])
    engine.optimizer.param_groups[0]["lr"] = 0.0
    before = bits(engine)
    for step in range(20):
        engine.step(closure(engine, step))
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
