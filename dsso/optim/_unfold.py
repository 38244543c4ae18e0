"""A tensor looked at along one of its sides."""

from __future__ import annotations

from torch import Tensor


def gram(x: Tensor, dim: int) -> Tensor:
    """X_i X_i^T of the unfolding along `dim`.

    Shapes:
        x: any. result: [side, side].
    """
    flat_DN = x.movedim(dim, 0).reshape(x.shape[dim], -1)
    return flat_DN @ flat_DN.mT


def along(matrix_DD: Tensor, x: Tensor, dim: int) -> Tensor:
    """The product of a matrix with side `dim` of a tensor.

    Shapes:
        x, result: of the same shape, the side [D] at `dim`.
    """
    moved = x.movedim(dim, 0)
    return (matrix_DD @ moved.reshape(moved.shape[0], -1)).view(moved.shape).movedim(0, dim)
