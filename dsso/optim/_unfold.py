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


def _whole(like: Tensor) -> int:
    """Longest side that is not cut to leave products out: on a GPU it is the number of launches that counts."""
    return max(1, triangle.PANEL // 4) if like.device.type == "cpu" else triangle.PANEL


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
    if triangle.asking_is_free(keep):
        factor = float(keep)
    else:
        sum_KDD.mul_(keep)
        factor = 1.0
    if sum_KDD.shape[1] <= _whole(sum_KDD):
        sum_KDD.baddbmm_(x_KDN, x_KDN.mT, beta=factor, alpha=weight)
        return
    for sum_DD, x_DN in zip(sum_KDD, x_KDN, strict=True):
        triangle.add_gram_(sum_DD.mT, x_DN.mT, weight, factor)


def upper_gram(x_DN: Tensor) -> Tensor:
    """X X^T, on and above the diagonal; what is below has no meaning.

    Shapes:
        result: [D, D].
    """
    out_DD = x_DN.new_empty(len(x_DN), len(x_DN))
    triangle.add_gram_(out_DD, x_DN.mT, keep=0.0)
    return out_DD


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
    side, height = q_KDD.shape[1], _whole(q_KDD)
    if side <= height:
        return along(q_KDD.mT if transposed else q_KDD, x_KS, dim)
    x_KDN = unfolded(x_KS, dim)
    out_KDN = torch.empty_like(x_KDN)
    for start in range(0, side, height):
        end = min(start + height, side)
        rows_KHN = out_KDN[:, start:end]
        if transposed:
            torch.bmm(q_KDD[:, :end, start:end].mT, x_KDN[:, :end], out=rows_KHN)
        else:
            torch.bmm(q_KDD[:, start:end, start:], x_KDN[:, start:], out=rows_KHN)
    moved = x_KS.movedim(dim + 1, 1)
    return out_KDN.view(moved.shape).movedim(1, dim + 1)
