"""Symmetric matrices by half: computing, packing and keeping one triangle.

A sum of outer products needs half of the products; on the wire it is a packed triangle; and at its owner one square
holds two matrices, the running sum above the diagonal and on and below it the Cholesky factor (or the inverse itself,
which is symmetric), with the diagonal of the sum beside it:

    store_DD = strict upper triangle of S  +  L,        diagonal_D = diag S

so a factor with its factorization costs D^2 + D numbers instead of 2 D^2. Everything goes panel by panel, so that
nothing but a few rows is copied and no index is longer than one panel's triangle.

Legend of shape suffixes: `D` side of the matrix, `N` rows of data, `P` entries of a packed triangle, D(D+1)/2,
`R` columns of a right-hand side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from dsso.linalg import solve_cpu

PANEL = 256
"""Rows of a panel: large enough for matrix products to be fast, small enough to save half of them."""
NARROW = 32
"""Sides up to this, of adapters' inner factors, are solved with their factor's inverse for more columns than this."""
WHOLE = 2048
"""Sides up to this are made whole for a product: fewer steps, for a copy that is gone at once."""


def asking_is_free(flag: Tensor) -> bool:
    """Whether the value of a tensor can be had without waiting for a device."""
    return flag.device.type == "cpu"


def panels(dim: int) -> Iterator[tuple[int, int]]:
    """First and last-plus-one row of every panel."""
    for start in range(0, dim, PANEL):
        yield start, min(start + PANEL, dim)


@lru_cache(maxsize=32)
def _triangle(side: int, device: torch.device) -> Tensor:
    """Flat indices of the upper triangle of one diagonal block."""
    rows, columns = torch.triu_indices(side, side, device=device)
    flat: Tensor = rows * side + columns
    return flat


@lru_cache(maxsize=32)
def _strictly_upper(side: int, device: torch.device) -> Tensor:
    return torch.ones(side, side, dtype=torch.bool, device=device).triu(1)


def packed_size(dim: int) -> int:
    """Entries of a packed triangle, dim (dim + 1) / 2."""
    return dim * (dim + 1) // 2


def add_gram_(sum_DD: Tensor, x_ND: Tensor, scale: float = 1.0, keep: float = 1.0) -> None:
    """S <- keep S + scale X^T X, in place, on and above the diagonal (blocks on it are filled on both sides).

    A little more than half of the multiplications of a full product: large sides are halved, what is right of the
    diagonal is one product, and small ones go panel by panel.

    Args:
        sum_DD: S.
        x_ND: X.
        scale: of the product.
        keep: of what was there; 0: S holds nothing yet, it is written.
    """
    dim = sum_DD.shape[0]
    if dim > 2 * PANEL:
        half = dim // 2
        add_gram_(sum_DD[:half, :half], x_ND[:, :half], scale, keep)
        sum_DD[:half, half:].addmm_(x_ND[:, :half].mT, x_ND[:, half:], beta=keep, alpha=scale)
        add_gram_(sum_DD[half:, half:], x_ND[:, half:], scale, keep)
        return
    # Narrow panels save more; on a GPU it is the number of launches that counts.
    height = max(1, PANEL // 4) if sum_DD.device.type == "cpu" else PANEL
    for start in range(0, dim, height):
        end = min(start + height, dim)
        sum_DD[start:end, start:].addmm_(x_ND[:, start:end].mT, x_ND[:, start:], beta=keep, alpha=scale)


def pack_into(out_P: Tensor, x_DD: Tensor) -> None:
    """Write the upper triangle, panel by panel: the triangle of the block on the diagonal, then what is right of it.

    Shapes:
        out_P: [P], contiguous. x_DD: only the upper triangle is read.
    """
    dim, at = x_DD.shape[0], 0
    for start, end in panels(dim):
        height, wide = end - start, dim - end
        index = _triangle(height, x_DD.device)
        block = x_DD[start:end, start:end].reshape(-1)
        out_P.narrow(0, at, index.numel()).copy_(block.index_select(0, index))
        at += index.numel()
        if wide:
            out_P.narrow(0, at, height * wide).view(height, wide).copy_(x_DD[start:end, end:])
            at += height * wide


def unpack(x_P: Tensor, dim: int) -> Tensor:
    """The matrix whose upper triangle was packed; below the blocks on the diagonal it is zero.

    Shapes:
        result: [dim, dim].
    """
    out_DD = x_P.new_zeros(dim, dim)
    at = 0
    for start, end in panels(dim):
        height, wide = end - start, dim - end
        index = _triangle(height, x_P.device)
        block = x_P.new_zeros(height * height)
        block.index_copy_(0, index, x_P.narrow(0, at, index.numel()))
        out_DD[start:end, start:end] = block.view(height, height)
        at += index.numel()
        if wide:
            out_DD[start:end, end:] = x_P.narrow(0, at, height * wide).view(height, wide)
            at += height * wide
    return out_DD


def accumulate_(store_DD: Tensor, diagonal_D: Tensor, sum_DD: Tensor, keep: Tensor, take: Tensor) -> None:
    """S <- keep S + sum where `take`, in place; the Cholesky factor below the diagonal stays.

    Args:
        store_DD: see the module; any floating dtype, computed in that of `sum_DD`.
        diagonal_D: of S.
        sum_DD: only the upper triangle is read; overwritten.
        keep: scalar tensor.
        take: boolean scalar tensor; where it is false S stays, and not even a NaN of the sum reaches it.
    """
    if asking_is_free(take):
        # The choice need not be made number by number.
        if take:
            _accumulate_all_(store_DD, diagonal_D, sum_DD, float(keep))
        return
    # The fewest passes over memory: one multiply-add into the sum, one choice between it and what was there.
    diagonal_D.copy_(torch.where(take, diagonal_D * keep + sum_DD.diagonal(), diagonal_D))
    for start, end in panels(store_DD.shape[0]):
        upper = _strictly_upper(end - start, store_DD.device)
        block, new = store_DD[start:end, start:end], sum_DD[start:end, start:end]
        new.addcmul_(block.to(new.dtype), keep)
        torch.where(upper & take, new.to(block.dtype), block, out=block)
        if end < store_DD.shape[0]:
            right, new = store_DD[start:end, end:], sum_DD[start:end, end:]
            new.addcmul_(right.to(new.dtype), keep)
            torch.where(take, new.to(right.dtype), right, out=right)


def _accumulate_all_(store_DD: Tensor, diagonal_D: Tensor, sum_DD: Tensor, keep: float) -> None:
    """S <- keep S + sum, in one pass over memory."""
    diagonal_D.mul_(keep).add_(sum_DD.diagonal())
    for start, end in panels(store_DD.shape[0]):
        upper = _strictly_upper(end - start, store_DD.device)
        block, new = store_DD[start:end, start:end], sum_DD[start:end, start:end]
        torch.where(upper, torch.add(new, block, alpha=keep).to(block.dtype), block, out=block)
        if end < store_DD.shape[0]:
            right = store_DD[start:end, end:]
            torch.add(sum_DD[start:end, end:], right, alpha=keep, out=right)


def mirrored(upper_DD: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle, in place."""
    for start, end in panels(upper_DD.shape[0]):
        corner = upper_DD[start:end, start:end].triu()
        upper_DD[start:end, start:end] = corner + corner.triu(1).mT
        upper_DD[end:, start:end] = upper_DD[start:end, end:].mT
    return upper_DD


def symmetric(store_DD: Tensor, diagonal_D: Tensor, dtype: torch.dtype) -> Tensor:
    """S as a full matrix of its own."""
    upper_DD = store_DD.to(dtype).triu(1)
    full_DD = upper_DD + upper_DD.mT
    full_DD.diagonal().copy_(diagonal_D)
    return full_DD


def lower_of(
    store_DD: Tensor, diagonal_D: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> Tensor:
    """Lower triangle of scale S + shift I, for a factorization; above the diagonal there is anything.

    Args:
        store_DD: see the module.
        diagonal_D: of S.
        scale: scalar tensor.
        shift: scalar tensor.
        dtype: to compute in.
    """
    # Row by row in memory, as the square that the result is copied back into.
    out_DD = torch.empty(store_DD.shape, dtype=dtype, device=store_DD.device).copy_(store_DD.mT)
    out_DD.mul_(scale.to(dtype))
    out_DD.diagonal().copy_(diagonal_D.to(dtype) * scale.to(dtype) + shift.to(dtype))
    return out_DD


def factorize_(damped_DD: Tensor) -> Tensor:
    """Cholesky factorization in place, of and into the lower triangle; whether it failed, a boolean scalar tensor.

    On a CPU large matrices go panel by panel, each corrected by one product with those before it: LAPACK's routine
    as torch calls it spends as long on clearing the other triangle as on the factorization.
    """
    dim = damped_DD.shape[0]
    if damped_DD.device.type != "cpu" or dim <= 2 * PANEL:
        lower_DD, info = torch.linalg.cholesky_ex(damped_DD)
        damped_DD.copy_(lower_DD)
        failed = info != 0
    else:
        failed = torch.zeros((), dtype=torch.bool, device=damped_DD.device)
        eye = torch.eye(PANEL // 2, dtype=damped_DD.dtype, device=damped_DD.device)
        for start in range(0, dim, PANEL // 2):
            end = min(start + PANEL // 2, dim)
            panel = damped_DD[start:, start:end]
            if start:
                panel.addmm_(damped_DD[start:, :start], damped_DD[start:end, :start].mT, alpha=-1.0)
            corner, info = torch.linalg.cholesky_ex(panel[: end - start])
            panel[: end - start] = corner
            failed = failed | (info != 0)
            if end < dim:
                inverse = torch.linalg.solve_triangular(
                    corner, eye[: end - start, : end - start], upper=False
                )
                panel[end - start :] = panel[end - start :] @ inverse.mT
    # NaN compares false everywhere, so LAPACK may report success on it: look at the diagonal as well.
    finite: Tensor = torch.isfinite(damped_DD.diagonal()).all()
    bad: Tensor = failed | ~finite
    return bad


def write_lower_(store_DD: Tensor, chol_DD: Tensor, good: Tensor) -> None:
    """Keep a new Cholesky factor, in place, where `good` (boolean scalar tensor); S above the diagonal stays."""
    asked = asking_is_free(good)
    if asked and not good:
        return
    for start, end in panels(store_DD.shape[0]):
        block, new = store_DD[start:end, start:end], chol_DD[start:end, start:end]
        lower = ~_strictly_upper(end - start, store_DD.device)
        torch.where(lower & good, new.to(block.dtype), block, out=block)
        if start:
            left, new = store_DD[start:end, :start], chol_DD[start:end, :start]
            if asked:
                left.copy_(new)
            else:
                torch.where(good, new.to(left.dtype), left, out=left)


def solve_lower(store_DD: Tensor, v_DR: Tensor) -> Tensor:
    """(L L^T)^-1 V by two triangular solves that read nothing above the diagonal.

    Shapes:
        result: [D, R].
    """
    solved = solve_cpu.solve(store_DD, v_DR)
    if solved is not None:
        return solved
    lower_DD = store_DD if store_DD.dtype == v_DR.dtype else store_DD.to(v_DR.dtype)
    dim = store_DD.shape[0]
    if dim <= NARROW < v_DR.shape[1]:
        # LAPACK goes through the columns one by one: two products with L^-1 are faster than that.
        eye_DD = torch.eye(dim, dtype=v_DR.dtype, device=v_DR.device)
        inverse_DD = torch.linalg.solve_triangular(lower_DD, eye_DD, upper=False)
        narrow_DR: Tensor = inverse_DD.mT @ (inverse_DD @ v_DR)
        return narrow_DR
    half_DR = torch.linalg.solve_triangular(lower_DD, v_DR, upper=False)
    out_DR: Tensor = torch.linalg.solve_triangular(lower_DD.mT, half_DR, upper=True)
    return out_DR


def multiply_lower(store_DD: Tensor, v_DR: Tensor) -> Tensor:
    """X V, X symmetric and given by its lower triangle; nothing above the diagonal is read.

    Large sides are halved: what is below the diagonal is used twice, as it lies and transposed.

    Shapes:
        result: [D, R].
    """
    dim = store_DD.shape[0]
    if dim <= WHOLE:
        lower_DD = store_DD.tril()
        full_DD = lower_DD + lower_DD.tril(-1).mT
        return full_DD @ v_DR
    half = dim // 2
    left_DR = multiply_lower(store_DD[:half, :half], v_DR[:half])
    right_DR = multiply_lower(store_DD[half:, half:], v_DR[half:])
    left_DR.addmm_(store_DD[half:, :half].mT, v_DR[half:])
    right_DR.addmm_(store_DD[half:, :half], v_DR[:half])
    return torch.cat([left_DR, right_DR])
