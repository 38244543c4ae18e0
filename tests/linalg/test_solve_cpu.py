"""The compiled solve with a few columns, against float64 and against torch's own."""

from __future__ import annotations

import pytest
import torch

from dsso.linalg import solve_cpu, triangle

SIDES = (1, 2, 7, 8, 9, 127, 128, 129, 300, 513)
COLUMNS = (1, 7, 8, 9, 16, 23, 32)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if solve_cpu._kernel() is None:
        pytest.skip("no compiler is here")
    monkeypatch.setattr(solve_cpu, "MOST_THREADS", 10**6)


def _problem(
    side: int, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side * 100 + columns)
    x_DD = torch.randn(side, side, generator=generator, dtype=torch.float64)
    lower_DD = torch.linalg.cholesky(x_DD @ x_DD.mT / side + torch.eye(side, dtype=torch.float64))
    # What lies above the diagonal belongs to someone else.
    square_DD = (lower_DD + torch.full_like(lower_DD, float("nan")).triu(1)).to(dtype).contiguous()
    return square_DD, torch.randn(side, columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_it_solves(side: int, dtype: torch.dtype) -> None:
    for columns in COLUMNS:
        square_DD, v_DR = _problem(side, columns, dtype)
        wanted = torch.cholesky_solve(v_DR.double(), square_DD.double().tril())
        for given in (v_DR, v_DR.mT.contiguous().mT):
            found = solve_cpu.solve(square_DD, given)
            assert found is not None
            assert found.shape == v_DR.shape
            worst = (found - wanted).norm() / wanted.norm()
            assert worst < 1e-6, (columns, float(worst))


def test_rounding_does_not_grow_with_the_side() -> None:
    errors = []
    for side in (128, 1500):
        square_DD, v_DR = _problem(side, 8)
        wanted = torch.cholesky_solve(v_DR.double(), square_DD.double().tril())
        found = solve_cpu.solve(square_DD, v_DR)
        assert found is not None
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 3 * errors[0], errors


def test_it_can_be_left_to_torch_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_cpu, "_ALLOWED", [True])
    square_DD, v_DR = _problem(40, 8)
    assert solve_cpu.solve(square_DD, v_DR) is not None
    solve_cpu.allow(False)
    assert solve_cpu.solve(square_DD, v_DR) is None


def test_the_right_hand_side_stays() -> None:
    square_DD, v_DR = _problem(40, 8)
    before = v_DR.clone()
    solve_cpu.solve(square_DD, v_DR)
    assert torch.equal(v_DR, before)


def test_what_it_does_not_take_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    square_DD, v_DR = _problem(60, 8)
    many = torch.randn(60, solve_cpu.MOST_COLUMNS + 1)
    assert solve_cpu.solve(square_DD, many) is None
    assert solve_cpu.solve(square_DD, v_DR[:, :0]) is None
    assert solve_cpu.solve(square_DD.double(), v_DR.double()) is None
    assert solve_cpu.solve(square_DD.half(), v_DR) is None
    transposed = square_DD.mT.contiguous().mT
    assert solve_cpu.solve(transposed, v_DR) is None
    wanted = torch.cholesky_solve(many.double(), square_DD.double().tril())
    torch.testing.assert_close(triangle.solve_lower(square_DD, many).double(), wanted, rtol=1e-5, atol=1e-5)
    quick = triangle.solve_lower(square_DD, v_DR)
    monkeypatch.setattr(solve_cpu, "MOST_THREADS", 0)
    assert solve_cpu.solve(square_DD, v_DR) is None
    torch.testing.assert_close(triangle.solve_lower(square_DD, v_DR), quick, rtol=1e-5, atol=1e-5)
