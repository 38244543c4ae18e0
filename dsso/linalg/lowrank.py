"""Low-rank form of a covariance: its leading eigenpairs and a mean tail, updated without a D x D matrix.

    S ~ Q C Q^T + t (I - Q Q^T),        Q_DK orthonormal, C_KK, t = (tr S - tr C) / (D - K)

One window of data X_ND gives the sketch Y_DK = X^T (X Q), which is linear in the data and so may be summed over
micro-batches and ranks, and its trace. With the running sum S <- beta S + X^T X,

    Z = beta Q C + Y  =  S Q,      core = Q^T Z,      S ~ Z core^-1 Z^T        (single-pass Nystroem approximation)

and Z's own orthonormal basis is the next Q: every window is one step of a block power iteration, so the basis turns
towards the leading eigenvectors. The approximation is positive semi-definite and never above S; what it misses is
in the tail, because the trace is exact.

Legend of shape suffixes: `D` side, `K` rank, `R` columns of a right-hand side, `N` rows of data.

Sources: Halko, Martinsson, Tropp 2011, section 5.5 (single pass); Tropp, Yurtsever, Udell, Cevher 2017 (fixed-rank
Nystroem with a shift); the mean tail keeps the trace, as in probabilistic PCA (Tipping and Bishop 1999).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A sum in low-rank form.

    Attributes:
        basis_DK: orthonormal columns. core_KK: symmetric. trace: of the whole sum, scalar.
    """

    basis_DK: Tensor
    core_KK: Tensor
    trace: Tensor


def start_basis(dim: int, rank: int, seed: int, like: Tensor) -> Tensor:
    """Random orthonormal columns, the same in every process.

    Shapes:
        result: [dim, rank].
    """
    generator = torch.Generator().manual_seed(seed)
    gauss_DK = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    basis_DK: Tensor = torch.linalg.qr(gauss_DK)[0].to(dtype=like.dtype, device=like.device)
    return basis_DK


def sketch(x_ND: Tensor, basis_DK: Tensor) -> Tensor:
    """Y = X^T (X Q).

    Shapes:
        result: [D, K].
    """
    return x_ND.mT @ (x_ND @ basis_DK)


def update(old: LowRank, y_DK: Tensor, trace: Tensor, keep: Tensor) -> LowRank:
    """S <- keep S + sum, from the sketch of the sum with `old.basis_DK`.

    Args:
        old: before.
        y_DK: sketch of the new data.
        trace: theirs.
        keep: scalar tensor.
    """
    z_DK = keep * (old.basis_DK @ old.core_KK) + y_DK
    core_KK = old.basis_DK.mT @ z_DK
    core_KK = (core_KK + core_KK.mT) / 2
    total = keep * old.trace + trace
    # The shift makes the core invertible where data has not filled the rank, and lets such columns of the basis stay
    # where they were instead of following rounding errors. S + shift I has the same eigenvectors, and the shift is
    # taken off again; the form stays positive semi-definite, as no eigenvalue of the approximation is below it.
    rank = core_KK.shape[0]
    shift = (torch.finfo(core_KK.dtype).eps * 1024) * core_KK.diagonal().sum().clamp_min(0) + 1e-37
    eye_KK = torch.eye(rank, dtype=core_KK.dtype, device=core_KK.device)
    chol_KK, info = torch.linalg.cholesky_ex(core_KK + shift * eye_KK)
    basis_DK, r_KK = torch.linalg.qr(z_DK + shift * old.basis_DK)
    half_KK = torch.linalg.solve_triangular(chol_KK, r_KK.mT, upper=False)
    new_KK = half_KK.mT @ half_KK - shift * eye_KK
    # No rank can hold more than the trace; a core that could not be factorized keeps the old form, decayed.
    fits = (info == 0) & torch.isfinite(new_KK).all() & torch.isfinite(basis_DK).all()
    return LowRank(
        torch.where(fits, basis_DK, old.basis_DK),
        torch.where(fits, new_KK, keep * old.core_KK),
        total,
    )


def tail(form: LowRank) -> Tensor:
    """Mean of the eigenvalues outside the basis, a scalar tensor, not negative."""
    dim, rank = form.basis_DK.shape
    rest = (form.trace - form.core_KK.diagonal().sum()).clamp_min(0)
    return rest / max(dim - rank, 1)


class Inverse(NamedTuple):
    """(S + shift)^-1 = Q K Q^T + s I.

    Attributes:
        k_KK: K. s: scalar.
    """

    k_KK: Tensor
    s: Tensor


def leading(form: LowRank, energy: float) -> LowRank:
    """The same form with the fewest leading columns of its basis that hold a share of the trace; the rest is tail.

    The power iteration sorts the columns by what they hold, so no eigenvalues are needed (which a device could not
    give without being waited for). Shapes stay as they are: in the core, what is left out becomes a multiple of the
    identity, the new tail, which is what the form says of all other directions.

    Args:
        form: of rank K.
        energy: share of the trace, in (0, 1]; all columns where they hold less.
    """
    dim = form.basis_DK.shape[0]
    held_K = form.core_KK.diagonal()
    before_K = held_K.cumsum(0) - held_K
    kept_K = (before_K < energy * form.trace).to(held_K.dtype)
    count = kept_K.sum()
    rest = (form.trace - (held_K * kept_K).sum()).clamp_min(0) / (dim - count).clamp_min(1)
    core_KK = form.core_KK * kept_K * kept_K.unsqueeze(1)
    core_KK = core_KK + torch.diag((1 - kept_K) * rest)
    return LowRank(form.basis_DK, core_KK, form.trace)


def invert(form: LowRank, scale: Tensor, shift: Tensor) -> tuple[Inverse, Tensor]:
    """Inverse of scale S + shift I, and whether it failed (boolean scalar tensor).

    Args:
        form: of S.
        scale: scalar tensor.
        shift: scalar tensor, positive.
    """
    rank = form.core_KK.shape[0]
    eye_KK = torch.eye(rank, dtype=form.core_KK.dtype, device=form.core_KK.device)
    s = 1 / (scale * tail(form) + shift)
    chol_KK, info = torch.linalg.cholesky_ex(scale * form.core_KK + shift * eye_KK)
    inverse_KK = torch.cholesky_inverse(chol_KK)
    failed = (info != 0) | ~torch.isfinite(inverse_KK).all() | ~torch.isfinite(s)
    return Inverse(inverse_KK - s * eye_KK, s), failed


def solve(basis_DK: Tensor, inverse: Inverse, v_DR: Tensor) -> Tensor:
    """(S + shift)^-1 V.

    Shapes:
        result: [D, R].
    """
    return inverse.s * v_DR + basis_DK @ (inverse.k_KK @ (basis_DK.mT @ v_DR))
