"""Roots and bases against dense float64, and what happens when a decomposition fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.linalg import roots


def _psd(side: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(side, rank, generator=generator, dtype=torch.float64)
    return (half @ half.mT / rank).to(dtype)


@settings(max_examples=30, deadline=None)
@given(side=st.integers(1, 24), rank=st.integers(1, 24), order=st.sampled_from([1, 2, 4, 6]))
def test_both_roots_are_roots(side: int, rank: int, order: int) -> None:
    x_DD, shift = _psd(side, rank, side * 100 + rank), 0.05
    damped_DD = x_DD + shift * torch.eye(side, dtype=x_DD.dtype)
    for root_DD, failed in (
        roots.inverse_root(x_DD, 1 / order, shift),
        roots.newton_root(x_DD, order, shift),
    ):
        assert not failed
        back_DD = torch.linalg.matrix_power(root_DD, order) @ damped_DD
        torch.testing.assert_close(back_DD, torch.eye(side, dtype=x_DD.dtype), rtol=1e-5, atol=1e-5)


def test_any_power() -> None:
    x_DD = _psd(9, 12, 0)
    w, v = torch.linalg.eigh(x_DD + 0.1 * torch.eye(9).double())
    found, failed = roots.inverse_root(x_DD, 0.37, 0.1)
    assert not failed
    torch.testing.assert_close(found, v * w.pow(-0.37) @ v.mT)


def test_rank_one_in_float32_is_no_failure() -> None:
    """As T5's factors are; rounding makes some eigenvalues negative."""
    x_DD = _psd(200, 1, 3, torch.float32) * 1e4
    found, failed = roots.inverse_root(x_DD, 0.25, 1e-6)
    assert not failed
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("condition", "decomposed"),
    [
        (1e1, [torch.float32]),
        (1.9e4, [torch.float32]),
        (4e4, [torch.float32, torch.float64]),  # the sum of the squares does not tell
        (1e7, [torch.float64]),
    ],
)
def test_only_well_conditioned_roots_are_of_float32(
    condition: float, decomposed: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    basis_DD, _ = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))
    x_DD = (basis_DD * torch.logspace(0, -8, 96, dtype=torch.float64)) @ basis_DD.mT
    x_DD = ((x_DD + x_DD.mT) / 2).float()
    w_D, v_DD = torch.linalg.eigh(x_DD.double())
    exact_DD = (v_DD * (w_D.clamp_min(0.0) + 1 / condition).pow(-0.25)) @ v_DD.mT
    real, seen = torch.linalg.eigh, []

    def watching(x: torch.Tensor) -> Any:
        seen.append(x.dtype)
        return real(x)

    monkeypatch.setattr(torch.linalg, "eigh", watching)
    found_DD, failed = roots.inverse_root(x_DD.tril(), 0.25, 1 / condition)
    assert not failed
    assert seen == decomposed
    wrong_DD = found_DD.double() - exact_DD
    assert torch.linalg.matrix_norm(wrong_DD, 2) < 5e-3 * torch.linalg.matrix_norm(exact_DD, 2)
    gradient_DN = (v_DD * w_D.clamp_min(0.0).sqrt()) @ torch.randn(96, 96, dtype=torch.float64)
    assert (wrong_DD @ gradient_DN).norm() < 1e-4 * (exact_DD @ gradient_DN).norm()


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_what_is_not_finite_fails_quietly(spoil: float) -> None:
    x_DD = torch.eye(5)
    x_DD[2, 2] = spoil
    w_D, v_DD, failed = roots.eigh(x_DD)
    assert failed
    assert torch.equal(v_DD, torch.eye(5))
    assert torch.equal(w_D, torch.zeros(5))
    assert roots.newton_root(x_DD, 4, 0.1)[1]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_failed_decomposition_is_repeated(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere; here the same place stands for both."""
    real, calls = torch.linalg.eigh, 0

    def failing(x: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls > fails:
            return real(x)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    x_DD = _psd(6, 6, 1, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(roots, "_attempts", lambda x: iter([x.double(), x.double()]))
    w_D, v_DD, failed = roots.eigh(x_DD)
    assert failed is (fails == 2)
    assert w_D.dtype == v_DD.dtype == torch.float64
    if failed:
        assert torch.equal(v_DD, torch.eye(6).double())
    else:
        torch.testing.assert_close(w_D, real(x_DD.double())[0])


def test_newton_says_when_it_did_not_get_there() -> None:
    assert roots.newton_root(_psd(8, 8, 0), 4, 1e-9, most=3)[1]


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_turning_leads_to_the_eigenvectors(ridge: float) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    x_DD = basis * torch.logspace(0, -3, 8, dtype=torch.float64) @ basis.mT
    q_DD = torch.eye(8, dtype=torch.float64)
    for _ in range(400 if ridge else 60):
        q_DD, order_D = roots.turned_basis(x_DD, q_DD, ridge)
    torch.testing.assert_close(q_DD.abs(), basis.abs(), rtol=1e-6, atol=1e-6)
    assert order_D.tolist() == list(range(8))
    # Without a ridge a basis whose columns are in another order is sorted, and says where they were.
    _, order_D = roots.turned_basis(x_DD, basis[:, [3, 0, 1, 2, 4, 5, 6, 7]], ridge)
    assert order_D.tolist() == ([0, 1, 2, 3, 4, 5, 6, 7] if ridge else [1, 2, 3, 0, 4, 5, 6, 7])


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_with_a_ridge_bases_do_not_follow_rounding(rank: int) -> None:
    exact_DD = _psd(12, rank, rank)
    found = []
    for seed in (1, 2):
        noise_DD = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed)) * 1e-7
        x_DD = exact_DD.float() + (noise_DD + noise_DD.mT) * exact_DD.diagonal().max().float()
        q_DD = torch.eye(12)
        for _ in range(5):
            q_DD, _ = roots.turned_basis(x_DD, q_DD, 0.1)
            torch.testing.assert_close(q_DD.mT @ q_DD, torch.eye(12), rtol=1e-5, atol=1e-5)
        found.append(q_DD)
    # But for a column's sign, which nothing depends on.
    assert ((found[0] * found[1]).sum(0).abs() - 1).abs().max() < 1e-5
