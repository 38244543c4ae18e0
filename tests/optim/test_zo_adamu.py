"""ZO-AdaMU: its annealing, its memory, and its first step."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from dsso.optim._probes import Piece, Probe
from dsso.optim.zo_adamu import Config, Method, anneal
from tests.optim.forward import bits, closure, made


def test_annealing_ends_as_figure_1_does() -> None:
    method = Method(Config(t3=6000))
    courses = list(zip(*map(method.annealed, range(6000)), strict=True))
    for course, end in zip(courses, (0.47, 0.15, 0.00), strict=True):
        assert course[-1] == pytest.approx(end, abs=0.005)
        assert set(course[:999]) == {1.0}
        assert set(course[3999:]) == {course[-1]}
        assert all(before > after for before, after in pairwise(course[1000:3999]))
        # without a jump where it begins
        assert max(before - after for before, after in pairwise(course)) < 0.002


def test_annealing_is_a_function_of_the_step_alone() -> None:
    method, steps = Method(Config(t3=600)), list(range(700))
    there = [method.annealed(step) for step in steps]
    random.Random(0).shuffle(steps)
    assert [method.annealed(step) for step in sorted(steps)] == there
    assert {step: method.annealed(step) for step in steps} == dict(enumerate(there))


def test_annealing_that_has_reached_the_bottom_stays_there() -> None:
    course = [anneal(1.5, t, 0, 40, 60) for t in range(60)]
    assert course[0] == 1.0
    assert all(before >= after for before, after in pairwise(course))
    assert course[-1] == 0.0


@pytest.mark.parametrize("mode", ["paper", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_first_step_is_finite_in_16_bits(mode: str, dtype: torch.dtype) -> None:
    engine = made(dtype, "zo_adamu", mode=mode, t3=600, lr=1e-3)
    before = bits(engine)
    engine.step(closure(engine, 0))
    assert engine.health()["skipped_steps"] == 0
    assert all(p.isfinite().all() for p in engine.module.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in bits(engine).items())


@pytest.mark.parametrize("mode", ["paper", "fixed"])
def test_the_memory_has_the_sign_of_the_slope_in_one_mode(mode: str) -> None:
    memories = []
    for slope in (2.0, -2.0):
        method = Method(Config(t3=6, mode=mode))
        piece = Piece("w", 0, torch.zeros(50), False)
        method.attach([piece])
        method.update([piece], torch.tensor([[slope]], dtype=torch.float64), 0, 0.0)
        memories.append(method.held("momentum", "w", 0, 50).clone())
    assert torch.equal(memories[1], -memories[0] if mode == "fixed" else memories[0])
    assert memories[0].std() > 0.5


def test_a_perturbation_goes_along_the_memory_and_the_step_along_the_perturbation() -> None:
    method = Method(Config(t3=6, lr=1.0, floor=1e9))
    assert method.shows_state
    piece = Piece("w", 0, torch.zeros(400), False)
    method.attach([piece])
    method.held("momentum", "w", 0, 400).fill_(3.0)
    shown = torch.empty(400)
    write = method.write(Probe(0, 1.0), 5)
    assert write is not None
    write("w", 0, piece.base, shown)
    # b1 = 0.15: the mean is 0.85 of the memory's.
    assert float(shown.mean()) == pytest.approx(0.854 * 3.0, abs=0.15)
    method.update([piece], torch.tensor([[1.0]], dtype=torch.float64), 5, 1e9)
    torch.testing.assert_close(piece.base, -shown)
    torch.testing.assert_close(method.held("momentum", "w", 0, 400), shown)


def test_without_a_floor_steps_have_heavy_tails() -> None:
    lengths = {}
    for mode in ("paper", "fixed"):
        method = Method(Config(t3=6, mode=mode))
        piece = Piece("w", 0, torch.zeros(200_000), False)
        method.attach([piece])
        method.update([piece], torch.tensor([[1.0]], dtype=torch.float64), 5, 1.0)
        lengths[mode] = float(piece.base.abs().max())
    assert lengths["fixed"] < 10 < 1000 < lengths["paper"]
