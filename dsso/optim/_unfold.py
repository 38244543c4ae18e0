"""Stacks of tensors of one shape, looked at along one of their sides.

Legend of shape suffixes: `K` tensors of a stack, `D` the side in question, `N` all others together; `KS` a stack of
tensors of any sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsso.linalg import triangle


def per_block(x_K: Tensor, like_KS: Tensor) -> Tensor:
    """One number a tensor of the stack, in a shape that broadcasts over it."""
    return x_K.view(-1, *(1 for _ in like_KS.shape[1:]))


def norms(x_KS: Tensor) -> Tensor:
    """Length of every tensor of the stack, in a shape that broadcasts over it."""
    found: Tensor = torch.linalg.vector_norm(x_KS, dim=tuple(range(1, x_KS.dim())), keepdim=True)
    return found


def rms(x_KS: Tensor) -> Tensor:
    """Root mean square of every tensor of the stack, in a shape that broadcasts over it."""
    found: Tensor = norms(x_KS) / math.sqrt(x_KS[0].numel())
    return found


def unfolded(x_KS: Tensor, dim: int) -> Tensor:
    """[K, D, N]: side `dim` of the tensors against all others."""
    moved = x_KS.movedim(dim + 1, 1)
    return moved.reshape(*moved.shape[:2], -1)


def add_gram(sum_KDD: Tensor, x_KS: Tensor, dim: int, keep: Tensor, weight: float) -> None:
    """S <- keep S + weight X_i X_i^T with the unfolding along `dim`, in place, the lower triangle alone.

    Of a wide side half of the products are left out; what is above the diagonal has no meaning.

    Args:
        sum_KDD: S.
        x_KS: X.
        dim: side of the tensors, the stack not counted.
        keep: scalar tensor.
        weight: number.
    """
    x_KDN = unfolded(x_KS, dim)
    sum_KDD.mul_(keep)
    if sum_KDD.shape[1] <= triangle.PANEL:
        sum_KDD.baddbmm_(x_KDN, x_KDN.mT, alpha=weight)
        return
    for sum_DD, x_DN in zip(sum_KDD, x_KDN, strict=True):
        for start, end in triangle.panels(len(sum_DD)):
            sum_DD[start:end, :end].addmm_(x_DN[start:end], x_DN[:end].mT, alpha=weight)


def gram(x: Tensor, dim: int) -> Tensor:
    """X_i X_i^T of the unfolding along `dim` of one tensor.

    Shapes:
        x: any. result: [side, side].
    """
    flat_DN = x.movedim(dim, 0).reshape(x.shape[dim], -1)
    return flat_DN @ flat_DN.mT


def along(matrix_KDD: Tensor, x_KS: Tensor, dim: int) -> Tensor:
    """The product of each matrix with side `dim` of its tensor.

    Shapes:
        x_KS, result: of the same shape, the side [D] at `dim`, the stack not counted.
    """
    if x_KS.dim() == 3:
        return matrix_KDD @ x_KS if dim == 0 else x_KS @ matrix_KDD.mT
    moved = x_KS.movedim(dim + 1, 1)
    return (matrix_KDD @ moved.reshape(*moved.shape[:2], -1)).view(moved.shape).movedim(1, dim + 1)


def along_upper(q_KDD: Tensor, x_KS: Tensor, dim: int, transposed: bool = False) -> Tensor:
    """`along` with upper triangular matrices, or their transposes: what is zero in a wide one is left out.

    Args:
        q_KDD: upper triangular.
        x_KS: the tensors.
        dim: the side, the stack not counted.
        transposed: Q^T instead of Q.
    """
    side = q_KDD.shape[1]
    if side <= triangle.PANEL:
        return along(q_KDD.mT if transposed else q_KDD, x_KS, dim)
    x_KDN = unfolded(x_KS, dim)
    out_KDN = torch.empty_like(x_KDN)
    for start, end in triangle.panels(side):
        if transposed:
            out_KDN[:, start:end] = q_KDD[:, :end, start:end].mT @ x_KDN[:, :end]
        else:
            out_KDN[:, start:end] = q_KDD[:, start:end, start:] @ x_KDN[:, start:]
    moved = x_KS.movedim(dim + 1, 1)
    return out_KDN.view(moved.shape).movedim(1, dim + 1)
