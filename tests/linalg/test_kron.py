"""Kronecker algebra against dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.linalg import kron


def _spd(dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / dim


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 7),
    inputs=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    damping=st.floats(1e-4, 1.0),
)
def test_solve_is_the_damped_kronecker_inverse(outputs: int, inputs: int, seed: int, damping: float) -> None:
    a_II, g_OO = _spd(inputs, seed), _spd(outputs, seed + 1)
    m_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shift = torch.tensor(damping, dtype=torch.float64)
    chol_a, failed_a = kron.cholesky(a_II, shift)
    chol_g, failed_g = kron.cholesky(g_OO, shift)
    assert not failed_a
    assert not failed_g
    u_OI = kron.solve(m_OI, chol_g, chol_a)
    eye_a, eye_g = torch.eye(inputs).double(), torch.eye(outputs).double()
    # Row-major vec: vec(G M A) = (G (x) A^T) vec(M).
    dense = torch.kron(g_OO + damping * eye_g, a_II + damping * eye_a)
    wanted = torch.linalg.solve(dense, m_OI.reshape(-1)).view(outputs, inputs)
    torch.testing.assert_close(u_OI, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


def test_identity_sides() -> None:
    m_OI = torch.randn(3, 4)
    assert torch.equal(kron.solve(m_OI, None, None), m_OI)


@settings(max_examples=40, deadline=None)
@given(mean_a=st.floats(1e-8, 1e8), mean_g=st.floats(1e-8, 1e8), damping=st.floats(1e-6, 1.0))
def test_split_has_the_product_it_claims(mean_a: float, mean_g: float, damping: float) -> None:
    a, g = torch.tensor(mean_a, dtype=torch.float64), torch.tensor(mean_g, dtype=torch.float64)
    relative = kron.split_damping(a, g, damping, "relative")
    absolute = kron.split_damping(a, g, damping, "absolute")
    assert relative.usable
    assert (relative.lambda_a * relative.lambda_g).item() == pytest.approx(
        damping * mean_a * mean_g, rel=1e-9
    )
    assert (absolute.lambda_a * absolute.lambda_g).item() == pytest.approx(damping, rel=1e-9)
    # pi balances the two sides: both are damped by the same share of their mean eigenvalue.
    for split in (relative, absolute):
        assert (split.lambda_a / a).item() == pytest.approx((split.lambda_g / g).item(), rel=1e-9)
    each = kron.split_damping(a, g, damping, "absolute_each")
    assert each.lambda_a.item() == each.lambda_g.item() == pytest.approx(damping)


@settings(max_examples=20, deadline=None)
@given(scale_a=st.floats(1e-4, 1e4), scale_g=st.floats(1e-4, 1e4))
def test_relative_damping_keeps_the_direction_under_rescaling(scale_a: float, scale_g: float) -> None:
    a_II, g_OO = _spd(5, 1), _spd(4, 2)
    m_OI = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def step(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        split = kron.split_damping(kron.mean_eigenvalue(a), kron.mean_eigenvalue(g), 0.01, "relative")
        return kron.solve(m_OI, kron.cholesky(g, split.lambda_g)[0], kron.cholesky(a, split.lambda_a)[0])

    u, v = step(a_II, g_OO), step(a_II * scale_a, g_OO * scale_g)
    torch.testing.assert_close(v * scale_a * scale_g, u, rtol=1e-7, atol=1e-10)


def test_zero_factor_is_not_usable_and_does_no_harm() -> None:
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for split in (
        kron.split_damping(zero, one, 0.1, "relative"),
        kron.split_damping(one, zero, 0.1, "absolute"),
    ):
        assert not split.usable
        assert torch.isfinite(split.lambda_a)
        assert split.lambda_a > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -10.0])
def test_failure_is_a_tensor_not_an_exception(value: float) -> None:
    x_DD = torch.eye(3)
    x_DD[1, 1] = value
    _, failed = kron.cholesky(x_DD, torch.tensor(0.1))
    assert failed.shape == ()
    assert failed


def test_jitter_rescues_what_rounding_made_indefinite() -> None:
    x_DD = torch.ones(4, 4) - 1e-6 * torch.eye(4)
    assert kron.cholesky(x_DD, torch.tensor(0.0))[1]
    assert not kron.cholesky(x_DD.double(), torch.tensor(0.0), jitter=1e-4)[1]


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 9))
def test_packing_round_trip(dim: int) -> None:
    x_DD = _spd(dim, dim)
    packed = kron.pack(x_DD)
    assert packed.shape == (kron.packed_size(dim),)
    assert torch.equal(kron.unpack(packed, dim), torch.triu(x_DD) + torch.triu(x_DD, 1).mT)
