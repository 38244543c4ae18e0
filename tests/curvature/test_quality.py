"""PSGD's criterion against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsso.curvature.quality import misfit, quality, wishart_moment
from dsso.errors import RunError


def spd(side: int, seed: int) -> Tensor:
    x = torch.randn(side, 2 * side, generator=torch.Generator().manual_seed(seed)).double()
    return x @ x.mT / side


def root(x: Tensor, power: float) -> Tensor:
    w, v = torch.linalg.eigh(x)
    return v * w.pow(power) @ v.mT


def test_traces_of_the_dense_matrices() -> None:
    p, s = [spd(3, 1), spd(4, 2)], [spd(3, 3), spd(4, 4)]
    whole_p, whole_s = torch.kron(*p), torch.kron(*s)
    cost = (whole_p @ whole_s).trace() + torch.linalg.inv(whole_p).trace()
    assert quality(p, s) == pytest.approx(float(cost / (2 * root(whole_s, 0.5).trace())), rel=1e-10)


def test_it_is_least_at_the_inverse_root() -> None:
    s = [spd(3, 3), spd(4, 4)]
    best = [root(x, -0.5) for x in s]
    assert quality(best, s) == pytest.approx(1.0, rel=1e-10)
    for seed in range(5):
        near = [x + 0.1 * spd(len(x), seed) * x.diagonal().mean() for x in best]
        assert quality(near, s) > 1.0
    # A factor may have any scale as long as the other has the inverse.
    assert quality([best[0] * 7, best[1] / 7], s) == pytest.approx(1.0, rel=1e-10)


def test_misfits_of_the_sides_are_what_no_scale_can_mend() -> None:
    p, s = [spd(3, 1), spd(4, 2)], [spd(3, 3), spd(4, 4)]
    sides = [misfit([one], [other]) for one, other in zip(p, s, strict=True)]
    assert None not in sides
    scales = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    least = min(quality([p[0] * scale, p[1]], s) for scale in scales)
    assert least == pytest.approx(math.prod(one for one in sides if one), rel=1e-5)
    assert misfit([root(s[0], -0.5) * 7], [s[0]]) == pytest.approx(1.0, rel=1e-10)
    # Blocks on the diagonal are one side.
    whole = misfit([torch.block_diag(*p)], [torch.block_diag(*s)])
    assert misfit(p, s) == pytest.approx(whole, rel=1e-10)
    assert misfit([torch.diag(torch.tensor([1.0, 0.0]))], [torch.eye(2)]) is None
    assert misfit([torch.eye(2)], [torch.zeros(2, 2)]) is None


def test_of_a_batch() -> None:
    covariance = spd(3, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 4, 3, generator=generator).double() @ torch.linalg.cholesky(covariance).mT
    c = x.mT @ x / 4
    torch.testing.assert_close((c @ c).mean(0), wishart_moment(covariance, 4), rtol=0.03, atol=0.03)


def test_what_is_refused() -> None:
    with pytest.raises(RunError, match="sides of preconditioner and curvature differ"):
        quality([torch.eye(3)], [torch.eye(4)])
    with pytest.raises(RunError, match="not positive definite"):
        quality([torch.diag(torch.tensor([1.0, 0.0]))], [torch.eye(2)])
