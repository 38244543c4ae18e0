"""Conjugate gradients against dense solves, and how a solve ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsso.linalg.cg import ConjugateGradients


def dot(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    return torch.stack(
        [torch.stack([(x * y).sum() for x, y in zip(*pair, strict=True)]).sum() for pair in pairs]
    )


def system(side: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(side, rank, generator=generator, dtype=torch.float64)
    return half @ half.mT / rank, torch.randn(side, generator=generator, dtype=torch.float64)


def pieces(vector: Tensor) -> list[Tensor]:
    """Uneven ones, one of them empty."""
    cut = len(vector) // 3
    return [vector[:cut].clone(), vector[:0].clone(), vector[cut:].clone()]


def solved(a: Tensor, b: Tensor, count: int, **given: object) -> tuple[Tensor, ConjugateGradients]:
    x = [torch.full_like(piece, 7.0) for piece in pieces(b)]
    solver = ConjugateGradients(x, pieces(b), dot, **given)  # type: ignore[arg-type]
    for _ in range(count):
        solver.feed(pieces(a @ torch.cat(solver.direction)))
    return torch.cat(x), solver


@settings(max_examples=25, deadline=None)
@given(side=st.integers(1, 20), rank=st.integers(1, 20))
def test_it_solves(side: int, rank: int) -> None:
    a, b = system(side, rank, side * 31 + rank)
    x, solver = solved(a, b, min(side, rank) + 3, shift=0.1)
    wanted = torch.linalg.solve(a + 0.1 * torch.eye(side).double(), b)
    torch.testing.assert_close(x, wanted, rtol=1e-8, atol=1e-8)
    assert float(solver.reached) < 1e-8


def test_a_relative_shift_is_one_of_the_curvature_along_the_right_side() -> None:
    a, b = system(9, 12, 0)
    x, solver = solved(a, b, 12, shift=0.3, relative=True)
    shift = 0.3 * (b @ a @ b) / (b @ b)
    assert float(solver.shift) == pytest.approx(float(shift))
    torch.testing.assert_close(x, torch.linalg.solve(a + shift * torch.eye(9).double(), b))


def test_the_residual_is_that_of_the_solution() -> None:
    a, b = system(12, 12, 1)
    x, solver = solved(a, b, 4, shift=0.01)
    left = b - a @ x - 0.01 * x
    torch.testing.assert_close(torch.cat(solver.residual), left)
    assert float(solver.reached) == pytest.approx(float(left.norm() / b.norm()))
    assert solver.taken == 4


def test_it_stays_where_it_is_small_enough() -> None:
    a, b = system(12, 12, 1)
    x, solver = solved(a, b, 30, shift=0.5, tolerance=0.1)
    assert float(solver.reached) <= 0.1
    again, _ = solved(a, b, int(solver.taken), shift=0.5)
    assert torch.equal(x, again)
    assert solver.taken < 12


def test_nothing_to_solve_is_zero() -> None:
    a, b = system(5, 5, 2)
    for relative in (False, True):
        x, solver = solved(a, b * 0, 3, shift=0.1, relative=relative)
        assert not x.any()
        assert solver.taken == 0
        assert solver.reached == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_ends_it(bad: float) -> None:
    a, b = system(8, 8, 3)
    wanted, _ = solved(a, b, 2, shift=0.1)
    x = pieces(b)
    solver = ConjugateGradients(x, pieces(b), dot, 0.1)
    for count in range(5):
        product = a @ torch.cat(solver.direction)
        if count == 2:
            product[1] = bad
        solver.feed(pieces(product))
    assert torch.equal(torch.cat(x), wanted)
    assert solver.taken == 2


def test_a_direction_of_negative_curvature_ends_it() -> None:
    a = torch.diag(torch.tensor([1.0, -2.0, 3.0])).double()
    b = torch.tensor([0.0, 1.0, 0.0]).double()
    x, solver = solved(a, b, 3, shift=0.1)
    assert not x.any()
    assert solver.taken == 0


def test_a_lost_product_ends_it() -> None:
    a, b = system(8, 8, 3)
    x = pieces(b)
    solver = ConjugateGradients(x, pieces(b), dot, 0.1)
    solver.feed(pieces(a @ torch.cat(solver.direction)))
    kept = torch.cat(x)
    for _ in range(2):
        solver.feed(pieces(a @ torch.cat(solver.direction)), torch.tensor(False))
    assert torch.equal(torch.cat(x), kept)
