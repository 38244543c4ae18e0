"""Second moments of one side of a stack of blocks: decayed sums of X X^T, of which one triangle is kept.

Narrow ones, an adapter's, are packed, which halves them; wide ones are squares, because products write into those, and
above the diagonal they hold anything.

Legend of shape suffixes: `K` blocks of a stack, `D` the side, `P` entries of a packed triangle, D(D+1)/2; `KS` a stack
of tensors of any sides.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsso.linalg import triangle
from dsso.optim._unfold import add_gram, unfolded

NARROW = 64
"""Sides up to this are packed."""


def lower(kept: Tensor, side: int) -> Tensor:
    """One block's second moment, on and below the diagonal; what is above has no meaning.

    Args:
        kept: packed or square.
        side: D.

    Shapes:
        result: [D, D].
    """
    if kept.dim() > 1:
        return kept
    square_DD = kept.new_zeros(side, side)
    square_DD.view(-1).index_copy_(0, _places(side, kept.device), kept)
    return square_DD


class SecondMoments:
    """Of a stack of blocks.

    Args:
        count: of blocks, K.
        side: D.
        dim: which of a block's sides that is.
        like: gives device and dtype.

    Attributes:
        tensor: state, [K, P] or [K, D, D].
    """

    def __init__(self, count: int, side: int, dim: int, like: Tensor) -> None:
        self.side, self.dim = side, dim
        shape = (self.elements(side),) if side <= NARROW else (side, side)
        self.tensor = like.new_zeros(count, *shape)

    @staticmethod
    def elements(side: int) -> int:
        """Numbers that are kept of one block."""
        return triangle.packed_size(side) if side <= NARROW else side * side

    def add(self, x_KS: Tensor, keep: Tensor, weight: float) -> None:
        """S <- keep S + weight X X^T with the unfoldings of the blocks along the side."""
        if self.side > NARROW:
            add_gram(self.tensor, x_KS, self.dim, keep, weight)
            return
        x_KDN = unfolded(x_KS, self.dim)
        gram_KP = (x_KDN @ x_KDN.mT).flatten(1).index_select(1, _places(self.side, x_KS.device))
        self.tensor.mul_(keep).add_(gram_KP, alpha=weight)

    def lower(self, index: int) -> Tensor:
        """That of one block, on and below the diagonal."""
        return lower(self.tensor[index], self.side)

    def whole(self, index: int) -> Tensor:
        """That of one block, symmetric, in memory of its own."""
        lower_DD = self.lower(index).tril()
        return lower_DD + lower_DD.tril(-1).mT


@lru_cache(maxsize=64)
def _places(side: int, device: torch.device) -> Tensor:
    """Flat indices of the lower triangle."""
    rows, columns = torch.tril_indices(side, side, device=device)
    flat: Tensor = rows * side + columns
    return flat
