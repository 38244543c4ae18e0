"""One triangle at a time, against full matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.linalg import triangle

SIDES = (1, 5, 255, 256, 257, 512, 600, 1000)


@pytest.fixture(params=["asks", "computes"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a choice: the one for CPUs, and the one that never asks a device."""
    if request.param == "computes":
        monkeypatch.setattr(triangle, "asking_is_free", lambda flag: False)


def _data(dim: int, seed: int = 0, rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", SIDES)
def test_sum_packing_and_both_matrices_in_one_square(dim: int) -> None:
    x_ND = _data(dim)
    full_DD = x_ND.mT @ x_ND
    sum_DD = torch.zeros(dim, dim, dtype=torch.float64)
    triangle.add_gram_(sum_DD, x_ND[:4])
    triangle.add_gram_(sum_DD, x_ND[4:])
    torch.testing.assert_close(sum_DD.triu(), full_DD.triu())
    decayed_DD = sum_DD.clone()
    triangle.add_gram_(decayed_DD, x_ND, 0.25, 0.5)
    torch.testing.assert_close(triangle.mirrored(decayed_DD), 0.75 * full_DD)
    unwritten_DD = torch.full_like(sum_DD, float("nan"))
    triangle.add_gram_(unwritten_DD, x_ND, keep=0.0)
    torch.testing.assert_close(triangle.mirrored(unwritten_DD), full_DD)

    wire_P = torch.full((triangle.packed_size(dim),), float("nan"), dtype=torch.float64)
    triangle.pack_into(wire_P, sum_DD)
    assert torch.equal(triangle.unpack(wire_P, dim).triu(), sum_DD.triu())

    store_DD, diagonal_D = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    one, yes = torch.tensor(1.0, dtype=torch.float64), torch.tensor(True)
    triangle.accumulate_(store_DD, diagonal_D, sum_DD.clone(), one, yes)
    triangle.accumulate_(store_DD, diagonal_D, sum_DD.clone(), one / 2, yes)
    torch.testing.assert_close(triangle.symmetric(store_DD, diagonal_D, torch.float64), 1.5 * full_DD)
    assert torch.equal(store_DD.tril(), torch.eye(dim, dtype=torch.float64))

    damped_DD = triangle.lower_of(store_DD, diagonal_D, one / 3, one * 2, torch.float64)
    wanted_DD = full_DD / 2 + 2 * torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(damped_DD.tril(), wanted_DD.tril())
    chol_DD = torch.linalg.cholesky(wanted_DD)
    assert not triangle.factorize_(damped_DD)
    torch.testing.assert_close(damped_DD.tril(), chol_DD)
    triangle.write_lower_(store_DD, chol_DD, yes)
    assert torch.equal(store_DD.tril(), chol_DD)
    torch.testing.assert_close(triangle.symmetric(store_DD, diagonal_D, torch.float64), 1.5 * full_DD)
    v_DR = _data(dim, 1, 3).mT
    torch.testing.assert_close(triangle.solve_lower(store_DD, v_DR), torch.linalg.solve(wanted_DD, v_DR))


@pytest.mark.parametrize("dim", [5, 300])
def test_nothing_passes_a_closed_gate(dim: int) -> None:
    """A NaN that is not taken leaves no trace, in either half."""
    store_DD, diagonal_D = torch.eye(dim), torch.ones(dim)
    triangle.accumulate_(
        store_DD, diagonal_D, _data(dim, 0, dim).float(), torch.tensor(1.0), torch.tensor(True)
    )
    before, diagonal = store_DD.clone(), diagonal_D.clone()
    poison = torch.full((dim, dim), float("nan"))
    triangle.accumulate_(store_DD, diagonal_D, poison, torch.tensor(1.0), torch.tensor(False))
    triangle.write_lower_(store_DD, poison, torch.tensor(False))
    assert torch.equal(store_DD, before)
    assert torch.equal(diagonal_D, diagonal)


def test_a_solve_reads_nothing_above_the_diagonal() -> None:
    chol_DD = torch.linalg.cholesky(torch.eye(300) * 2 + torch.ones(300, 300))
    v_DR = torch.randn(300, 4)
    spoilt = chol_DD + torch.full((300, 300), float("nan")).triu(1).nan_to_num(0.0)
    spoilt[torch.ones(300, 300, dtype=torch.bool).triu(1)] = float("nan")
    assert torch.equal(triangle.solve_lower(spoilt, v_DR), triangle.solve_lower(chol_DD, v_DR))


@pytest.mark.parametrize("dim", [1, 8, triangle.NARROW, triangle.NARROW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_side_with_many_columns(dim: int, dtype: torch.dtype) -> None:
    """As an adapter's inner factor is solved, whose matrix has as many columns as the layer."""
    spd_DD = _data(dim, 0, 4 * dim).mT @ _data(dim, 0, 4 * dim) / dim + torch.eye(dim, dtype=torch.float64)
    chol_DD = torch.linalg.cholesky(spd_DD).to(dtype)
    v_DR = _data(dim, 1, 200).mT.float()
    store_DD = torch.where(torch.ones(dim, dim).tril() > 0, chol_DD, float("nan"))
    wanted_DR = torch.cholesky_solve(v_DR.double(), chol_DD.double())
    torch.testing.assert_close(triangle.solve_lower(store_DD, v_DR).double(), wanted_DR, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 31, 32, 33, 131])
def test_a_product_reads_the_lower_triangle_alone(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "WHOLE", 32)
    x_ND, v_DR = _data(dim), _data(dim, 1, 3).mT
    full_DD = x_ND.mT @ x_ND
    half_DD = full_DD.clone()
    half_DD[torch.ones(dim, dim, dtype=torch.bool).triu(1)] = float("nan")
    torch.testing.assert_close(triangle.multiply_lower(half_DD, v_DR), full_DD @ v_DR)


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(1, 40), seed=st.integers(0, 1000))
def test_narrow_storage_rounds_and_nothing_else(dim: int, seed: int) -> None:
    x_ND = _data(dim, seed).float()
    store_DD, diagonal_D = torch.eye(dim, dtype=torch.bfloat16), torch.zeros(dim)
    sum_DD = x_ND.mT @ x_ND
    triangle.accumulate_(store_DD, diagonal_D, sum_DD.clone(), torch.tensor(0.0), torch.tensor(True))
    found_DD = triangle.symmetric(store_DD, diagonal_D, torch.float32)
    torch.testing.assert_close(found_DD, sum_DD, rtol=2**-8, atol=1e-30)
    assert torch.equal(found_DD.diagonal(), sum_DD.diagonal())


@pytest.mark.parametrize("dim", [40, 700])
@pytest.mark.parametrize("spoil", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 35])
def test_a_failed_factorization_is_reported(dim: int, spoil: float, where: int) -> None:
    """In the first panel and in the last one."""
    x_DD = torch.eye(dim) * 2
    assert not triangle.factorize_(x_DD.clone())
    x_DD[dim - 1 - where, dim - 1 - where] = spoil
    assert triangle.factorize_(x_DD)
