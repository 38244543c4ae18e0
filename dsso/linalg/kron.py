"""Kronecker-factored curvature: damping and factorization.

Legend of shape suffixes: `I` inputs of a layer (+1 where it has a bias), `O` outputs, `D` either of them.

Formulas, with F ~ A (x) G and the gradient matrix M_OI:

- step            U = (G + l_G)^-1 M (A + l_A)^-1                          Martens & Grosse 2015, eq. 3 and 12
- split           l_A = pi sqrt(l), l_G = sqrt(l) / pi,
                  pi^2 = (tr A / dim A) / (tr G / dim G)                   ibid., section 6.3
- relative        l = c (tr A / dim A)(tr G / dim G) + floor,
                  l_A = sqrt(c) tr A / dim A, l_G = l / l_A

Nothing here synchronizes with the device: a failed factorization is reported as a tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsso.linalg import triangle

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
        values are positive all the same, so that solves stay finite.

    Source: Martens & Grosse 2015, section 6.3; relative form: scale-free, so it needs no knowledge of the loss.
    """
    curvature = mean_a * mean_g
    strength = damping * curvature + floor if mode == "relative" else curvature
    known = (mean_a > TINY) & torch.isfinite(mean_a)
    usable = known & (strength > 0) & torch.isfinite(curvature)
    one = torch.ones_like(mean_a)
    if mode == "relative":
        # That of A is its own, whatever its partner: it may be shared with layers whose G is not zero.
        lambda_a = damping**0.5 * torch.where(known, mean_a, one)
        lambda_g = torch.where(usable, strength / lambda_a, one)
    elif mode == "absolute":
        pi = torch.sqrt(torch.where(usable, mean_a, one) / torch.where(usable, mean_g, one))
        lambda_a, lambda_g = pi * damping**0.5, damping**0.5 / pi
    else:
        lambda_a, lambda_g = one * damping, one * damping
    return Damping(lambda_a, lambda_g, usable)


def cholesky(damped_DD: Tensor, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of a damped matrix, and whether it failed.

    Args:
        damped_DD: symmetric positive definite, in the dtype to factorize in; overwritten, only the lower triangle
            is read.
        jitter: further shift, relative to the mean eigenvalue.

    Returns:
        `(L_DD, failed)`; L is below and on the diagonal, above it there is anything. `failed` is a boolean scalar
        tensor, also true where L is not finite.
    """
    if jitter:
        damped_DD.diagonal().add_(jitter * mean_eigenvalue(damped_DD))
    return damped_DD, triangle.factorize_(damped_DD)


def inverse(damped_DD: Tensor, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inverse of a damped matrix by its Cholesky factor, and whether that failed; arguments as of `cholesky`.

    Returns:
        `(X_DD, failed)`; X is the inverse on and below the diagonal, anything where it failed.
    """
    chol_DD, failed = cholesky(damped_DD, jitter)
    # What failed is replaced by the identity: LAPACK's inverse would raise on it.
    chol_DD.masked_fill_(failed, 0.0)
    chol_DD.diagonal().add_(failed.to(chol_DD.dtype))
    return torch.cholesky_inverse(chol_DD), failed
