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
        chol_g, _ = kron.cholesky(g + split.lambda_g * torch.eye(4).double())
        chol_a, _ = kron.cholesky(a + split.lambda_a * torch.eye(5).double())
        return torch.cholesky_solve(torch.cholesky_solve(m_OI, chol_g.tril()).mT, chol_a.tril()).mT

    u, v = step(a_II, g_OO), step(a_II * scale_a, g_OO * scale_g)
    torch.testing.assert_close(v * scale_a * scale_g, u, rtol=1e-7, atol=1e-10)


def test_the_damping_of_a_shared_a_does_not_depend_on_which_g_it_is_looked_at_with() -> None:
    """A G that is zero makes its own layer wait, not the others that read the same inputs."""
    a = torch.tensor(100.0)
    alone, other = (kron.split_damping(a, torch.tensor(g), 0.01, "relative") for g in (0.0, 3.0))
    assert alone.lambda_a == other.lambda_a == pytest.approx(10.0)
    assert (bool(alone.usable), bool(other.usable)) == (False, True)


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
    _, failed = kron.cholesky(x_DD + 0.1 * torch.eye(3))
    assert failed.shape == ()
    assert failed


def test_jitter_rescues_what_rounding_made_indefinite() -> None:
    x_DD = torch.ones(4, 4) - 1e-6 * torch.eye(4)
    assert kron.cholesky(x_DD.clone())[1]
    assert not kron.cholesky(x_DD.double(), jitter=1e-4)[1]


@pytest.mark.parametrize("dim", [1, 30, 700])
def test_inverse(dim: int) -> None:
    """Below and on the diagonal, panel by panel or not; a failure is a tensor here as well."""
    x_DD = _spd(dim, dim) + torch.eye(dim, dtype=torch.float64)
    found_DD, failed = kron.inverse(x_DD.clone())
    assert not failed
    torch.testing.assert_close(found_DD.tril(), torch.linalg.inv(x_DD).tril())
    for spoilt in (float("nan"), -5.0, 0.0):
        y_DD = x_DD.clone()
        y_DD[-1, -1] = spoilt
        assert kron.inverse(y_DD)[1]
