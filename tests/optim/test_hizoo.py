"""HiZOO: the curvature moves, and towards the Hessian's diagonal."""

from __future__ import annotations

import pytest
import torch

from dsso.optim._probes import Piece, Probe
from dsso.optim.hizoo import Config, Method
from tests.optim.forward import closure, kept, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_curvature_moves_as_it_is_by_default(dtype: torch.dtype) -> None:
    engine = made(dtype, "hizoo")
    for step in range(5):
        engine.step(closure(engine, step))
        assert engine.health()["forwards"] == 3
    for value in kept(engine).values():
        assert value.dtype == torch.float32
        assert (value != 1.0).float().mean() > 0.9
        assert value.isfinite().all()


def test_perturbations_are_shaped_by_the_curvature() -> None:
    method = Method(Config())
    assert method.shows_state
    base, shown = torch.zeros(40), [torch.empty(40), torch.empty(40)]
    method.attach([Piece("w", 0, base, False)])
    for out, level in zip(shown, (1.0, 4.0), strict=True):
        method.held("curvature", "w", 0, 40).fill_(level)
        write = method.write(Probe(0, 0.1), 0)
        assert write is not None
        write("w", 0, base, out)
    torch.testing.assert_close(shown[1], shown[0] / 2)


def test_the_curvature_comes_to_rest_at_a_multiple_of_the_hessian() -> None:
    """On a quadratic with the diagonal d the expected change is zero at (1 + N/2) d, for N elements."""
    d = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    method = Method(Config(eps=1e-2, smooth={"type": "piecewise", "points": [[0, 0.05], [3000, 0.005]]}))
    piece = Piece("w", 0, torch.zeros(3, dtype=torch.float64), False)
    method.attach([piece])
    held, mean = method.held("curvature", "w", 0, 3), torch.zeros(3, dtype=torch.float64)
    for step in range(9000):
        losses = []
        for probe in method.probes(step):
            point, write = piece.base.clone(), method.write(probe, step)
            if write is not None:
                write("w", 0, piece.base, point)
            losses.append((d * point.square()).sum() / 2)
        method.update([piece], method.measure(torch.stack(losses), step), step, 0.0)
        mean += held.double() / 4000 if step >= 5000 else 0
    torch.testing.assert_close(mean, 2.5 * d, rtol=0.15, atol=0)


def test_the_curvature_keeps_its_bounds() -> None:
    method = Method(Config(bounds=(0.5, 2.0), smooth=0.9))
    piece = Piece("w", 0, torch.zeros(1000), False)
    method.attach([piece])
    for bent in (1e17, 0.0):
        method.update([piece], torch.tensor([[0.0, bent]], dtype=torch.float64), 0, 0.0)
        held = method.held("curvature", "w", 0, 1000)
        assert held.unique().tolist() == ([2.0] if bent else [0.5])


def test_curvatures_that_are_not_finite_are_told() -> None:
    method = Method(Config())
    losses = torch.tensor([1.0, float("inf"), 1.0], dtype=torch.float64)
    assert not method.measure(losses, 0).isfinite().any()
