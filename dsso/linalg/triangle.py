"""Symmetric matrices by half: computing, packing and keeping one triangle.

A sum of outer products needs half of the products; on the wire it is a packed triangle; and at its owner one square
holds two matrices, the running sum above the diagonal and the Cholesky factor on and below it, with the diagonal of
the sum beside it:

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

PANEL = 256
"""Rows of a panel: large enough for matrix products to be fast, small enough to save half of them."""


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


def add_gram_(sum_DD: Tensor, x_ND: Tensor) -> None:
    """S += X^T X, in place, on and above the diagonal (blocks on it are filled on both sides).

    A little more than half of the multiplications of a full product.
    """
    x_DN = x_ND.mT
    for start, end in panels(sum_DD.shape[0]):
        sum_DD[start:end, start:].addmm_(x_DN[start:end], x_ND[:, start:])


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
    """S <- keep S + take sum, in place; the Cholesky factor below the diagonal stays.

    Args:
        store_DD: see the module; any floating dtype, computed in that of `sum_DD`.
        diagonal_D: of S.
        sum_DD: only the upper triangle is read.
        keep: scalar tensor.
        take: boolean scalar tensor; where it is false nothing of `sum_DD` is used, not even a NaN.
    """
    zero = torch.zeros((), dtype=sum_DD.dtype, device=sum_DD.device)
    for start, end in panels(store_DD.shape[0]):
        upper = _strictly_upper(end - start, store_DD.device)
        block = store_DD[start:end, start:end]
        new = block.to(sum_DD.dtype) * keep + torch.where(take, sum_DD[start:end, start:end], zero)
        block.copy_(torch.where(upper, new.to(block.dtype), block))
        if end < store_DD.shape[0]:
            right = store_DD[start:end, end:]
            right.copy_(right.to(sum_DD.dtype) * keep + torch.where(take, sum_DD[start:end, end:], zero))
    diagonal_D.copy_(diagonal_D * keep + torch.where(take, sum_DD.diagonal(), zero))


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
    out_DD = store_DD.mT.to(dtype, copy=True).mul_(scale.to(dtype))
    out_DD.diagonal().copy_(diagonal_D.to(dtype) * scale.to(dtype) + shift.to(dtype))
    return out_DD


def write_lower_(store_DD: Tensor, chol_DD: Tensor, good: Tensor) -> None:
    """Keep a new Cholesky factor, in place, where `good` (boolean scalar tensor); S above the diagonal stays."""
    for start, end in panels(store_DD.shape[0]):
        block = store_DD[start:end, start:end]
        new = torch.where(good, chol_DD[start:end, start:end].to(block.dtype), block)
        block.copy_(torch.where(_strictly_upper(end - start, store_DD.device), block, new))
        if start:
            left = store_DD[start:end, :start]
            left.copy_(torch.where(good, chol_DD[start:end, :start].to(left.dtype), left))


def solve_lower(store_DD: Tensor, v_DR: Tensor) -> Tensor:
    """(L L^T)^-1 V by two triangular solves that read nothing above the diagonal.

    Shapes:
        result: [D, R].
    """
    lower_DD = store_DD if store_DD.dtype == v_DR.dtype else store_DD.to(v_DR.dtype)
    half_DR = torch.linalg.solve_triangular(lower_DD, v_DR, upper=False)
    out_DR: Tensor = torch.linalg.solve_triangular(lower_DD.mT, half_DR, upper=True)
    return out_DR
