"""The low-rank form of a running covariance, against dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.linalg import lowrank
from dsso.linalg.lowrank import LowRank

D = torch.float64


def _empty(dim: int, rank: int, dtype: torch.dtype = D) -> LowRank:
    like = torch.zeros((), dtype=dtype)
    basis = lowrank.start_basis(dim, rank, 3, like)
    return LowRank(basis, torch.zeros(rank, rank, dtype=dtype), like.clone())


def _dense(form: LowRank) -> torch.Tensor:
    inside = form.basis_DK @ form.basis_DK.mT
    outside = torch.eye(len(inside), dtype=inside.dtype) - inside
    return form.basis_DK @ form.core_KK @ form.basis_DK.mT + lowrank.tail(form) * outside


def _feed(form: LowRank, x_ND: torch.Tensor, keep: float = 0.95) -> LowRank:
    y_DK = lowrank.sketch(x_ND, form.basis_DK)
    return lowrank.update(form, y_DK, x_ND.square().sum(), torch.tensor(keep, dtype=x_ND.dtype))


@settings(max_examples=25, deadline=None)
@given(dim=st.integers(6, 30), rank=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_a_covariance_of_that_rank_is_exact_after_two_windows(dim: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(rank, dim, dtype=D, generator=generator)
    form, sum_DD = _empty(dim, rank), torch.zeros(dim, dim, dtype=D)
    for _ in range(2):
        x_ND = torch.randn(4 * rank, rank, dtype=D, generator=generator) @ root
        form, sum_DD = _feed(form, x_ND), 0.95 * sum_DD + x_ND.mT @ x_ND
    error = (_dense(form) - sum_DD).abs().max()
    # What the shift of the first window leaves grows with the angle between the random basis and the data: Nystroem
    # of S + shift I is above it by at most shift / cos^2.
    start_DK = lowrank.start_basis(dim, rank, 3, root)
    cosine = torch.linalg.svdvals(torch.linalg.qr(root.mT)[0].mT @ start_DK).min()
    shift = 1024 * torch.finfo(D).eps * sum_DD.trace()
    assert error < 2 * shift / cosine**2
    assert form.trace.item() == pytest.approx(sum_DD.trace().item(), rel=1e-12)


def test_the_leading_part_is_found_and_the_trace_is_exact() -> None:
    """On a slowly falling spectrum, within a few per cent of the best subspace after a dozen windows."""
    dim, rank = 120, 24
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=D, generator=generator))[0]
    root = (turn * torch.logspace(1, -2, dim, dtype=D)).mT
    form, sum_DD = _empty(dim, rank), torch.zeros(dim, dim, dtype=D)
    for _ in range(12):
        x_ND = torch.randn(200, dim, dtype=D, generator=generator) @ root
        form, sum_DD = _feed(form, x_ND), 0.95 * sum_DD + x_ND.mT @ x_ND
    values = torch.linalg.eigvalsh(sum_DD).flip(0)
    assert form.core_KK.trace() > 0.97 * values[:rank].sum()
    # Never above the truth: S - Q C Q^T is positive semi-definite.
    rest = sum_DD - form.basis_DK @ form.core_KK @ form.basis_DK.mT
    assert torch.linalg.eigvalsh(rest).min() > -1e-9 * values[0]
    torch.testing.assert_close(_dense(form).trace(), sum_DD.trace())
    eye = torch.eye(rank, dtype=D)
    torch.testing.assert_close(form.basis_DK.mT @ form.basis_DK, eye)


def test_sketches_of_parts_add_up() -> None:
    form = _empty(20, 4)
    x_ND = torch.randn(30, 20, dtype=D)
    parts = sum(lowrank.sketch(part, form.basis_DK) for part in x_ND.split(7))
    torch.testing.assert_close(parts, lowrank.sketch(x_ND, form.basis_DK))


def test_the_inverse_is_that_of_the_dense_form() -> None:
    form = _feed(_empty(15, 5), torch.randn(40, 15, dtype=D))
    scale, shift = torch.tensor(0.1, dtype=D), torch.tensor(0.7, dtype=D)
    inverse, failed = lowrank.invert(form, scale, shift)
    v_DR = torch.randn(15, 3, dtype=D)
    wanted = torch.linalg.solve(scale * _dense(form) + shift * torch.eye(15, dtype=D), v_DR)
    assert not failed
    torch.testing.assert_close(lowrank.solve(form.basis_DK, inverse, v_DR), wanted)


@pytest.mark.parametrize(("energy", "kept"), [(0.5, 1), (0.9, 2), (0.99, 3), (1.0, 6)])
def test_the_leading_columns_hold_the_energy_asked_for(energy: float, kept: int) -> None:
    """Eigenvalues 100, 30, 10 and nine of 0.1; the form then is the truth up to how far the iteration has come."""
    values = torch.tensor([100.0, 30.0, 10.0] + [0.1] * 9, dtype=D)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=D, generator=generator))[0]
    truth_DD = turn * values @ turn.mT
    form = _empty(12, 6)
    for _ in range(40):
        form = _feed(form, (turn * values.sqrt()).mT, 0.5)
    form = lowrank.LowRank(form.basis_DK, form.core_KK / 2, form.trace / 2)  # the sum of 1, 1/2, 1/4 ...
    torch.testing.assert_close(_dense(form), truth_DD, atol=0.2, rtol=0)
    found = lowrank.leading(form, energy)
    rest = values[kept:].sum() / (12 - kept)
    wanted_DD = turn[:, :kept] * (values[:kept] - rest) @ turn[:, :kept].mT + rest * torch.eye(12, dtype=D)
    torch.testing.assert_close(_dense(found), wanted_DD, atol=1e-6 if kept < 6 else 0.2, rtol=0)
    torch.testing.assert_close(_dense(found).trace(), values.sum())
    torch.testing.assert_close(lowrank.tail(found), rest, atol=1e-6, rtol=1e-6)
    one = torch.ones((), dtype=D)
    inverse, failed = lowrank.invert(found, one, one)
    assert not failed
    assert int((inverse.k_KK.abs().sum(0) > 1e-6).sum()) == min(kept, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_less_data_than_rank_and_none_at_all(dtype: torch.dtype, rows: int) -> None:
    form = _empty(12, 6, dtype)
    for seed in range(5):
        x_ND = torch.randn(rows, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        form = _feed(form, x_ND, 0.5)
        assert all(torch.isfinite(part).all() for part in form)
        eye = torch.eye(6, dtype=dtype)
        close = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(form.basis_DK.mT @ form.basis_DK, eye, atol=close, rtol=0)
        assert lowrank.tail(form) >= 0
        assert form.core_KK.trace() <= form.trace * 1.001 + 1e-12


def test_a_nan_keeps_basis_and_core_and_shows_in_the_trace() -> None:
    form = _feed(_empty(12, 4), torch.randn(20, 12, dtype=D))
    after = _feed(form, torch.full((2, 12), float("nan"), dtype=D))
    assert torch.equal(after.basis_DK, form.basis_DK)
    assert torch.isfinite(after.core_KK).all()
    assert torch.isnan(after.trace)
