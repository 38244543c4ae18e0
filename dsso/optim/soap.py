"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's second moments.

For a block with gradient G, of whose sides those with a basis Q_i are rotated (others stay as they are),

    G'  = G x_1 Q_1^T x_2 Q_2^T ...
    M'  <- beta1 M' + (1 - beta1) G'                    turned with the bases
    V   <- beta2 V + (1 - beta2) G' o G'                not turned
    U   = [M' / (sqrt V + eps)] x_1 Q_1 x_2 Q_2 ... sqrt(1 - beta2^n) / (1 - beta1^n)
    S_i <- beta S_i + (1 - beta) G_i G_i^T              G_i: unfolding along side i; beta: beta2 unless given
    Q_i <- qr((S_i + r_i I) Q_i)                        at the refresh interval, after the step; r_i: ridge mean(S_ii)

The first gradient makes the first bases and takes no step.

Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade 2024, algorithms 3 and 4. Deviations: bounded
blocks; of a long and narrow block only the short side is rotated; `eigh_every` makes a basis anew, with V carried over
as a variance is, by the squared entries of the rotation between the two; the ridge and the floor, without which a step
depends on rounding errors where S is close to singular or to a multiple of I. With `ridge: 0` and `floor: 0` it is the
published algorithm: first bases by an eigendecomposition, columns sorted by what they hold. With a ridge first bases
are one turn of the axes, and nothing is sorted.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dsso.clip import ClipMode
from dsso.linalg import roots
from dsso.linalg.kron import TINY
from dsso.optim._blocks import BlockCost, MatrixBlocks, Take, fresh
from dsso.optim._matrix import MatrixMethod
from dsso.optim._matrix_config import MatrixConfig
from dsso.optim._second_moment import SecondMoments
from dsso.optim._unfold import along, per_block

__all__ = ["Config", "Method"]


class Config(MatrixConfig):
    """Parameters of SOAP (`optimizer.params`)."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate, of the size of Adam's."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """m <- momentum m + u on clipped updates, on top of `beta1`."""
    clip: ClipMode = "none"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the norm of the update (`post`), which as with Adam is
    about the root of the number of elements."""
    beta1: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the averaged gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment in the eigenbasis."""
    shampoo_beta: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the second moments that the bases are made from; null: beta2."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    floor: float = Field(default=1e-3, ge=0, lt=1)
    """Roots of second moments below this share of the block's largest count as that; 0: as published."""
    ridge: float = Field(default=0.1, ge=0)
    """Added to the second moments in a turn of the bases, times the mean of their diagonal; 0: as published."""
    eigh_every: int | None = Field(default=None, ge=1)
    """Every so many refreshes a basis is made anew by an eigendecomposition; null: only the first one is."""


class Blocks(MatrixBlocks):
    """Second moments of the sides, their bases, and Adam's moments in them."""

    refreshed_last: ClassVar[bool] = True

    def __init__(self, count: int, sides: tuple[int, ...], config: Config, like: Tensor) -> None:
        super().__init__(count, sides, config, like)
        self._config = config
        self._kept = config.kept_sides(sides)
        self._sums = [SecondMoments(count, sides[dim], dim, like) for dim in self._kept]
        self._bases = [self.eye(sides[dim]) for dim in self._kept]
        self._mean, self._square = self.zeros(*sides), self.zeros(*sides)
        self._count, self._turns = self.zeros(), self.zeros()

    @staticmethod
    def cost(sides: tuple[int, ...], config: Any) -> BlockCost:
        """A second moment and a square a side, two moments; a QR factorization for a refresh, rotations for a step."""
        whole = math.prod(sides)
        kept = [sides[dim] for dim in config.kept_sides(sides)]
        return BlockCost(
            elements=sum(SecondMoments.elements(side) + side * side for side in kept) + 2 * whole + 2,
            refresh=sum(5.0 * side**3 + side * whole for side in kept),
            step=sum(2.5 * side * whole for side in kept),
        )

    def _rotated(self, x_KS: Tensor, back: bool = False) -> Tensor:
        for basis_KDD, dim in zip(self._bases, self._kept, strict=True):
            x_KS = along(basis_KDD if back else basis_KDD.mT, x_KS, dim)
        return x_KS

    def average(self, gradient_KS: Tensor, take: Take) -> None:
        """S, and of blocks with bases M and V."""
        config = self._config
        beta = config.beta2 if config.shampoo_beta is None else config.shampoo_beta
        for moments in self._sums:
            moments.add(gradient_KS, take.keep(beta), fresh(beta))
        if not any(self.usable):
            return
        rotated, mask = self._rotated(gradient_KS), self.mask()
        if mask is not None:
            # Of a block without bases the moments are zero, and stay so.
            rotated = torch.where(mask, rotated, 0.0)
        self._count.add_(take.count if mask is None else mask.view(-1) * take.count)
        self._mean.mul_(take.keep(config.beta1)).add_(rotated, alpha=fresh(config.beta1))
        self._square.mul_(take.keep(config.beta2)).addcmul_(rotated, rotated, value=fresh(config.beta2))

    def act(self, gradient_KS: Tensor, step: int) -> Tensor:
        """Adam's step in the eigenbasis, turned back; nothing before there is one."""
        if not any(self.usable):
            return torch.zeros_like(gradient_KS)
        config = self._config
        root = self._square.sqrt()
        if config.floor:
            least = root.amax(dim=tuple(range(1, root.dim())), keepdim=True) * config.floor
            root = torch.maximum(root, least)
        first, second = (1 - beta**self._count for beta in (config.beta1, config.beta2))
        scale = second.sqrt() / first.clamp_min(TINY)
        moved = self._mean / root.add_(config.eps) * per_block(scale, root)
        return self._rotated(moved, back=True)

    def refresh(self, index: int) -> bool:
        """Turn the bases towards the eigenvectors, and the moments with them; all of it, or nothing."""
        config = self._config
        every, ridge = config.eigh_every, config.ridge
        first = not self.usable[index]
        anew = (first and not ridge) or (every is not None and (int(self._turns[index]) + 1) % every == 0)
        found, mean, square = [], self._mean[index : index + 1], self._square[index : index + 1]
        for moments, basis_KDD in zip(self._sums, self._bases, strict=True):
            sum_DD, basis_DD, dim = moments.whole(index), basis_KDD[index], moments.dim
            if not sum_DD.diagonal().mean() > TINY:
                return False  # a parameter that no loss has reached yet
            if anew:
                turned_DD, failed = roots.eigenbasis(sum_DD)
            else:
                turned_DD, order_D = roots.turned_basis(sum_DD, basis_DD, ridge)
                failed = not bool(torch.isfinite(turned_DD).all())
            if failed:
                return True
            if not first:
                between_DD = turned_DD.mT @ basis_DD
                mean = along(between_DD.unsqueeze(0), mean, dim)
                if anew:
                    square = along(between_DD.square().unsqueeze(0), square, dim)
                else:
                    square = square.index_select(dim + 1, order_D)
            found.append(turned_DD)
        for basis_KDD, turned_DD in zip(self._bases, found, strict=True):
            basis_KDD[index].copy_(turned_DD)
        self._mean[index].copy_(mean[0])
        self._square[index].copy_(square[0])
        self._turns[index] += 1
        self.usable[index] = True
        return False

    def tensors(self) -> dict[str, Tensor]:
        """All state."""
        out = {"count": self._count, "turns": self._turns, "mean": self._mean, "square": self._square}
        for moments, basis_KDD in zip(self._sums, self._bases, strict=True):
            out |= {f"sum{moments.dim}": moments.tensor, f"basis{moments.dim}": basis_KDD}
        return out


class Method(MatrixMethod):
    """SOAP on the matrices of a model."""

    block = Blocks
