"""Eigendecompositions that do not break a run, inverse roots of matrices, and eigenbases that follow them.

Legend of shape suffixes: `D` side of the matrix.

Formulas, with A = V diag(w) V^T:

- inverse root      (A + e I)^-s = V diag((w + e)^-s) V^T
- coupled Newton    X <- X T, M <- T^p M with T = ((p + 1) I - M) / p, from X = z^(1/p) I and M = z A,
                    z = (1 + p) / (2 |A|): X -> A^(-1/p) and M -> I               Guo and Higham 2006, eq. 3.2
- power iteration   Q <- qr((A + r I) Q): turns a basis towards the eigenvectors   Vyas et al. 2024, algorithm 4

Sources: Gupta, Koren, Singer 2018 (roots of Shampoo); Anil et al. 2020 (coupled Newton for them); Vyas et al. 2024
(SOAP). Deviations: decompositions are made in float64, those for the root of a well-conditioned matrix in its own type,
which takes half the time, and on the host where the device fails; a failure is a value, not an exception; power
iteration may have a ridge r.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsso.linalg import triangle

WELL_CONDITIONED = 2e4
"""Largest eigenvalue over the shift up to which a root is made of a decomposition in its matrix's own type. float32
takes some 1e-6 of the largest eigenvalue from all of them: at this limit up to 5e-3 of a fourth root's norm, in a
direction that the matrix has next to nothing in, and 1e-4 at most of a root's product with what its matrix is the
second moment of. At five times the limit parameters after five steps would tell, by 1e-5, how gradients were summed."""


def eigh(x_DD: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, bool]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric matrix, and whether all attempts failed.

    In float64 unless asked otherwise, because an inverse root blows up what a decomposition in float32 leaves of its
    small eigenvalues; where that fails, on the host. Asks the device whether each attempt has worked.

    Args:
        x_DD: symmetric; only the lower triangle is read.
        dtype: to decompose in.

    Returns:
        `(w_D, V_DD, failed)` in `dtype` on the device of `x_DD`; zeros and the identity where it failed.
    """
    if torch.isfinite(x_DD.sum(dtype=torch.float64)):
        for attempt in _attempts(x_DD.to(dtype)):
            try:
                w_D, v_DD = torch.linalg.eigh(attempt)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # torch.linalg.LinAlgError is one, and so is what a device library reports
                continue
            # What is not finite shows in a sum, which takes one pass instead of two.
            if torch.isfinite(w_D.sum() + v_DD.sum()):
                return w_D.to(x_DD.device), v_DD.to(x_DD.device), False
    eye_DD = torch.eye(x_DD.shape[0], dtype=dtype, device=x_DD.device)
    return torch.zeros_like(eye_DD[0]), eye_DD, True


def _attempts(x_DD: Tensor) -> Iterator[Tensor]:
    yield x_DD
    if x_DD.device.type != "cpu":
        yield x_DD.cpu()


def _eigh_of_shifted(x_DD: Tensor, shift: Tensor | float) -> tuple[Tensor, Tensor, bool]:
    """`eigh`, in the type of `x_DD` where its largest eigenvalue is within `WELL_CONDITIONED` times `shift`."""
    most = WELL_CONDITIONED * shift
    # Of a positive semi-definite matrix the largest eigenvalue is not below the sum of their squares over their sum.
    # The lower triangle holds half of the squares off the diagonal, and is all that may be looked at.
    trace, squares = x_DD.diagonal().sum(), x_DD.tril().square().sum()
    if x_DD.dtype is not torch.float64 and squares <= most * trace:
        w_D, v_DD, failed = eigh(x_DD, x_DD.dtype)
        if not failed and w_D[-1] <= most:
            return w_D, v_DD, False
    return eigh(x_DD)


def inverse_root(x_DD: Tensor, power: float, shift: Tensor | float) -> tuple[Tensor, bool]:
    """(X + shift I)^-power by an eigendecomposition, and whether it failed.

    Rounding may leave small negative eigenvalues: they count as zero.

    Args:
        x_DD: symmetric positive semi-definite.
        power: positive.
        shift: positive.
    """
    w_D, v_DD, failed = _eigh_of_shifted(x_DD, shift)
    # As a product of a matrix with its own transpose the root is symmetric and has no negative eigenvalue whatever
    # rounding does, and half of it need not be computed; nothing is lost in it that the result could hold.
    half_DD = (v_DD * (w_D.clamp_min(0.0) + shift).pow(-power / 2)).to(x_DD.dtype)
    root_DD = torch.empty_like(half_DD)
    triangle.add_gram_(root_DD, half_DD.mT, keep=0.0)
    return triangle.mirrored(root_DD), failed


def newton_root(
    x_DD: Tensor, order: int, shift: Tensor | float, tolerance: float = 1e-6, most: int = 100
) -> tuple[Tensor, bool]:
    """(X + shift I)^(-1/order) by the coupled Newton iteration, and whether it failed to converge.

    Products alone, which a device likes better than an eigendecomposition. It converges to about the square root of
    rounding relative to the condition number; what does not reach `tolerance` is reported as failed.

    Args:
        x_DD: symmetric positive semi-definite.
        order: p, at least 1.
        shift: positive.
        tolerance: largest entry of M - I.
        most: iterations.
    """
    side = x_DD.shape[0]
    eye_DD = torch.eye(side, dtype=x_DD.dtype, device=x_DD.device)
    damped_DD = x_DD + shift * eye_DD
    # The Frobenius norm bounds the largest eigenvalue, so the start is within the region of convergence.
    z = (1 + order) / (2 * torch.linalg.matrix_norm(damped_DD))
    m_DD, root_DD = damped_DD * z, eye_DD * z ** (1.0 / order)
    error = (m_DD - eye_DD).abs().max()
    for _ in range(most):
        if not torch.isfinite(error) or error <= tolerance:
            break
        t_DD = ((order + 1) * eye_DD - m_DD) / order
        next_DD, next_m_DD = root_DD @ t_DD, torch.linalg.matrix_power(t_DD, order) @ m_DD
        next_error = (next_m_DD - eye_DD).abs().max()
        # Near the end a growing error is rounding: what there is now is the best there will be.
        if error < 0.1 and next_error > error * 1.2:
            break
        root_DD, m_DD, error = next_DD, next_m_DD, next_error
    return (root_DD + root_DD.mT) / 2, not bool(error <= tolerance)


def eigenbasis(x_DD: Tensor) -> tuple[Tensor, bool]:
    """Eigenvectors by falling eigenvalue, and whether the decomposition failed (the identity then)."""
    _, v_DD, failed = eigh(x_DD)
    return (v_DD if failed else v_DD.flip(1)).to(x_DD.dtype), failed


def turned_basis(x_DD: Tensor, basis_DD: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration on X + r I, r = ridge trace(X) / D.

    The ridge leaves eigenvectors as they are and slows down those with eigenvalues below r. In return the new basis
    is a smooth function of X: without it, directions that X says nothing about are made of rounding errors. Without a
    ridge columns are sorted by what they hold of X, as published; with one they are not, because rounding decides
    between those that hold the same. The iteration itself brings the large ones to the front.

    Args:
        x_DD: symmetric positive semi-definite, not zero.
        basis_DD: orthonormal columns.
        ridge: 0 or more.

    Returns:
        `(Q_DD, order_D)`: the new basis, and the places that its columns had in the old one; not finite values where
        `x_DD` has some.
    """
    moved_DD = x_DD @ basis_DD
    if ridge:
        q_DD: Tensor = torch.linalg.qr(moved_DD + ridge * x_DD.diagonal().mean() * basis_DD)[0]
        return q_DD, torch.arange(len(x_DD), device=x_DD.device)
    order_D = torch.einsum("ij,ij->j", basis_DD, moved_DD).argsort(descending=True)
    return torch.linalg.qr(moved_DD[:, order_D])[0], order_D
