"""Kronecker-factored curvature: damping, factorization, solves and packed triangles.

Legend of shape suffixes: `I` inputs of a layer (+1 where it has a bias), `O` outputs, `D` either of them,
`P` entries of a packed triangle, D(D+1)/2.

Formulas, with F ~ A (x) G and the gradient matrix M_OI:

- step            U = (G + l_G)^-1 M (A + l_A)^-1                          Martens & Grosse 2015, eq. 3 and 12
- split           l_A = pi sqrt(l), l_G = sqrt(l) / pi,
                  pi^2 = (tr A / dim A) / (tr G / dim G)                   ibid., section 6.3
- relative        l = c (tr A / dim A)(tr G / dim G) + floor,
                  l_A = sqrt(c) tr A / dim A, l_G = l / l_A

Nothing here synchronizes with the device: a failed factorization is reported as a tensor.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DampingMode = Literal["relative", "absolute", "absolute_each"]

TINY = 1e-30
"""A mean eigenvalue at or below this is a factor that has seen nothing (LoRA's B = 0, an unused layer)."""


class Damping(NamedTuple):
    """What is added to the diagonal of each factor, and whether the pair is usable at all."""

    lambda_a: Tensor
    lambda_g: Tensor
    usable: Tensor


def mean_eigenvalue(x_DD: Tensor) -> Tensor:
    """tr(X)/D, a scalar tensor.

    Shapes:
        x_DD: symmetric.
    """
    return x_DD.diagonal().mean()


def split_damping(
    mean_a: Tensor, mean_g: Tensor, damping: float, mode: DampingMode, floor: Tensor | float = 0.0
) -> Damping:
    """Damping of the two factors of one layer.

    Args:
        mean_a: mean eigenvalue of A, tr(A)/dim(A), scalar.
        mean_g: mean eigenvalue of G, scalar.
        damping: c for `relative` (dimensionless); lambda in units of the Fisher for the absolute modes.
        mode: `relative`: lambda = c mean_a mean_g + floor, split by pi as far as there is no floor.
            `absolute`: lambda itself, split by pi. `absolute_each`: lambda added to A and to G alike, as in the
            poster's K-FAC and in public code.
        floor: for `relative`, what is added whatever the layer's own curvature, in units of the Fisher. Without
            it a layer whose gradient is rounding noise, or LoRA's first factor while the second is zero, would
            take a step as long as 1/noise.

    Returns:
        Scalars; where the inputs are zero, or nothing is known of the curvature, the pair is not usable and the
        values are 1, so that solves stay finite.

    Source: Martens & Grosse 2015, section 6.3; relative form: scale-free, so it needs no knowledge of the loss.
    """
    curvature = mean_a * mean_g
    strength = damping * curvature + floor if mode == "relative" else curvature
    usable = (mean_a > TINY) & (strength > 0) & torch.isfinite(mean_a) & torch.isfinite(curvature)
    one = torch.ones_like(mean_a)
    a = torch.where(usable, mean_a, one)
    if mode == "relative":
        lambda_a = damping**0.5 * a
        lambda_g = torch.where(usable, strength, one) / lambda_a
    elif mode == "absolute":
        pi = torch.sqrt(a / torch.where(usable, mean_g, one))
        lambda_a, lambda_g = pi * damping**0.5, damping**0.5 / pi
    else:
        lambda_a, lambda_g = one * damping, one * damping
    return Damping(lambda_a, lambda_g, usable)


def cholesky(x_DD: Tensor, shift: Tensor, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of X + shift * I, and whether it failed.

    Args:
        x_DD: symmetric positive semi-definite, in the dtype to factorize in.
        shift: scalar added to the diagonal.
        jitter: further shift, relative to the mean eigenvalue of X.

    Returns:
        `(L_DD, failed)`; `failed` is a boolean scalar tensor, also true where L is not finite.
    """
    shifted = x_DD.clone()
    extra = shift.to(x_DD.dtype)
    if jitter:
        extra = extra + jitter * mean_eigenvalue(x_DD)
    shifted.diagonal().add_(extra)
    factor_DD, info = torch.linalg.cholesky_ex(shifted)
    # NaN compares false everywhere, so LAPACK may report success on it: look at the diagonal as well.
    failed = (info != 0) | ~torch.isfinite(factor_DD.diagonal()).all()
    return factor_DD, failed


def solve(m_OI: Tensor, chol_g_OO: Tensor | None, chol_a_II: Tensor | None) -> Tensor:
    """U = G^-1 M A^-1 from Cholesky factors; None stands for the identity.

    Shapes:
        m_OI, result: the layer's gradient, a bias as last column.

    Source: Martens & Grosse 2015, eq. 12, as two triangular solves each.
    """
    u_OI = m_OI
    if chol_g_OO is not None:
        u_OI = torch.cholesky_solve(u_OI, chol_g_OO)
    if chol_a_II is not None:
        u_OI = torch.cholesky_solve(u_OI.mT, chol_a_II).mT
    return u_OI


def packed_size(dim: int) -> int:
    """Entries of a packed triangle, dim (dim + 1) / 2."""
    return dim * (dim + 1) // 2


@lru_cache(maxsize=64)
def _triangle(dim: int, device: torch.device) -> Tensor:
    rows, cols = torch.triu_indices(dim, dim, device=device)
    flat: Tensor = rows * dim + cols
    return flat


def pack(x_DD: Tensor) -> Tensor:
    """The upper triangle as a vector, row by row.

    Shapes:
        result: [P].
    """
    return x_DD.reshape(-1).index_select(0, _triangle(x_DD.shape[0], x_DD.device))


def unpack(x_P: Tensor, dim: int) -> Tensor:
    """The symmetric matrix of a packed upper triangle.

    Shapes:
        result: [dim, dim].
    """
    full = x_P.new_zeros(dim * dim)
    full.index_copy_(0, _triangle(dim, x_P.device), x_P)
    upper_DD = full.view(dim, dim)
    return upper_DD + upper_DD.triu(1).mT
