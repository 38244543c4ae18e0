"""How well a preconditioner of Kronecker factors suits a curvature, by PSGD's criterion.

For a preconditioner P and pairs of a displacement v ~ N(0, I) and what the gradient answers, h, with S = E[h h^T],

    c(P) = E[h^T P h + v^T P^-1 v] = tr(P S) + tr(P^-1),     c* = 2 tr S^(1/2), reached at P = S^(-1/2)

so c(P) / c* is 1 at best, for a noiseless answer h = H v at P = |H|^-1. With P = P_1 (x) ... and S = S_1 (x) ...
traces multiply, and nothing of the size of P is ever made. Where a learning rate or a clip sets the length of a step,
the scale of P is free; at its best scale

    min over s of c(s P) / c* = product over the sides of  (tr(P_i S_i) tr(P_i^-1))^(1/2) / tr S_i^(1/2)

and every side has a `misfit` of its own, 1 at best.

Source: Li 2018, *Preconditioned stochastic gradient descent*, eq. 9; as a measure of curvature: Ishikawa and Yokota
2024, *When does second-order optimization speed up training?*, figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsso.errors import RunError


def quality(preconditioner: Sequence[Tensor], moment: Sequence[Tensor]) -> float:
    """c(P) / c*, at least 1; in float64.

    Args:
        preconditioner: symmetric positive definite factors of P, [D, D] each.
        moment: symmetric positive semi-definite factors of S, of the same sides in the same order.

    Raises:
        RunError: when the sides are not the same, or a factor of P is not positive definite.
    """
    shapes = [tuple(p.shape) for p in preconditioner], [tuple(s.shape) for s in moment]
    if shapes[0] != shapes[1]:
        raise RunError("sides of preconditioner and curvature differ", got=shapes[0], allowed=str(shapes[1]))
    through = inverse = best = 1.0
    for p, s in zip(preconditioner, moment, strict=True):
        p_DD, s_DD = p.double(), s.double()
        least_D = torch.linalg.eigvalsh(p_DD)
        if not least_D[0] > 0:
            raise RunError(
                "the preconditioner is not positive definite", got=f"eigenvalue {float(least_D[0]):.3g}"
            )
        through *= float((p_DD * s_DD).sum())
        inverse *= float((1 / least_D).sum())
        best *= float(torch.linalg.eigvalsh(s_DD).clamp_min(0.0).sqrt().sum())
    return (through + inverse) / (2 * best) if best else math.inf


def misfit(preconditioner: Sequence[Tensor], moment: Sequence[Tensor]) -> float | None:
    """What one side contributes to c(P) / c* at the best scale of P, at least 1; in float64.

    Args:
        preconditioner: blocks on the diagonal of the side's factor of P, symmetric, [D, D] each.
        moment: those of its factor of S, positive semi-definite.

    Returns:
        None where a block of P is not positive definite or S is zero: nothing can be said.
    """
    through = inverse = best = 0.0
    for p, s in zip(preconditioner, moment, strict=True):
        p_DD, s_DD = p.double(), s.double()
        spectrum_D = torch.linalg.eigvalsh(p_DD)
        if not spectrum_D[0] > 0:
            return None
        through += float((p_DD * s_DD).sum())
        inverse += float((1 / spectrum_D).sum())
        best += float(torch.linalg.eigvalsh(s_DD).clamp_min(0.0).sqrt().sum())
    return math.sqrt(through * inverse) / best if best else None


def wishart_moment(covariance: Tensor, samples: int) -> Tensor:
    """E[C^2] of C = 1/n sum x x^T over n samples x ~ N(0, covariance): S of a side that one batch has measured.

    Args:
        covariance: [D, D].
        samples: n.
    """
    c_DD = covariance
    return c_DD @ c_DD * (1 + 1 / samples) + c_DD * (c_DD.diagonal().sum() / samples)
