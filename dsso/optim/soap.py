"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's second moments.

For a block with gradient G, of whose sides those with a basis Q_i are rotated (others stay as they are),

    G'  = G x_1 Q_1^T x_2 Q_2^T ...
    M   <- beta1 M + (1 - beta1) G                      kept unrotated
    V   <- beta2 V + (1 - beta2) G' o G'                kept rotated
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
from dsso.optim._matrix import BlockCost, MatrixBlock, MatrixMethod
from dsso.optim._matrix_config import MatrixConfig
from dsso.optim._unfold import along, gram

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


class Block(MatrixBlock):
    """Second moments of the sides, their bases, and Adam's moments."""

    refreshed_last: ClassVar[bool] = True

    def __init__(self, sides: tuple[int, ...], config: Config, like: Tensor) -> None:
        self._config = config
        self._kept = config.kept_sides(sides)
        self._sums = [like.new_zeros(sides[dim], sides[dim]) for dim in self._kept]
        self._bases = [torch.eye(sides[dim], dtype=like.dtype, device=like.device) for dim in self._kept]
        self._mean, self._square = like.new_zeros(sides), like.new_zeros(sides)
        self._count, self._turns = like.new_zeros(()), like.new_zeros(())

    @staticmethod
    def cost(sides: tuple[int, ...], config: Any) -> BlockCost:
        """Two squares a side and two moments; a QR factorization for a refresh, rotations for a step."""
        whole = math.prod(sides)
        kept = [sides[dim] for dim in config.kept_sides(sides)]
        return BlockCost(
            elements=sum(2 * side * side for side in kept) + 2 * whole + 2,
            refresh=sum(4.0 * side**3 for side in kept),
            step=sum(4.0 * side * whole for side in kept),
        )

    def _rotated(self, x: Tensor, back: bool = False) -> Tensor:
        for basis_DD, dim in zip(self._bases, self._kept, strict=True):
            x = along(basis_DD if back else basis_DD.mT, x, dim)
        return x

    def average(self, gradient: Tensor, take: Tensor) -> None:
        """S, and with bases M and V."""
        config, one = self._config, torch.ones_like(self._count)
        beta = config.beta2 if config.shampoo_beta is None else config.shampoo_beta
        keep, new = torch.where(take, beta * one, one), torch.where(take, (1 - beta) * one, 0.0)
        for sum_DD, dim in zip(self._sums, self._kept, strict=True):
            sum_DD.mul_(keep).add_(gram(gradient, dim) * new)
        if not self.usable:
            return
        self._count.add_(torch.where(take, one, 0.0))
        for moment, decay, value in (
            (self._mean, config.beta1, gradient),
            (self._square, config.beta2, self._rotated(gradient).square()),
        ):
            keep, new = torch.where(take, decay * one, one), torch.where(take, (1 - decay) * one, 0.0)
            moment.mul_(keep).add_(value * new)

    def act(self, gradient: Tensor, step: int) -> Tensor:
        """Adam's step in the eigenbasis, turned back; nothing before there is one."""
        if not self.usable:
            return torch.zeros_like(gradient)
        config = self._config
        root = self._square.sqrt()
        moved = self._rotated(self._mean) / (root.clamp_min(config.floor * root.max()) + config.eps)
        first, second = (1 - beta**self._count for beta in (config.beta1, config.beta2))
        return self._rotated(moved, back=True) * (second.sqrt() / first.clamp_min(TINY))

    def refresh(self) -> bool:
        """Turn the bases towards the eigenvectors; all of them, or none."""
        every, ridge = self._config.eigh_every, self._config.ridge
        first = not self.usable and not ridge
        anew = first or (every is not None and (int(self._turns) + 1) % every == 0)
        found, square = [], self._square
        for sum_DD, basis_DD, dim in zip(self._sums, self._bases, self._kept, strict=True):
            if not sum_DD.diagonal().mean() > TINY:
                return False  # a parameter that no loss has reached yet
            if anew:
                turned_DD, failed = roots.eigenbasis(sum_DD)
                if failed:
                    return True
                square = along((turned_DD.mT @ basis_DD).square(), square, dim)
            else:
                turned_DD, order_D = roots.turned_basis(sum_DD, basis_DD, ridge)
                if not torch.isfinite(turned_DD).all():
                    return True
                square = square.index_select(dim, order_D)
            found.append(turned_DD)
        for basis_DD, turned_DD in zip(self._bases, found, strict=True):
            basis_DD.copy_(turned_DD)
        self._square.copy_(square)
        self._turns += 1
        self.usable = True
        return False

    def ready(self, step: int) -> bool:
        """There are bases."""
        return self.usable

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        out = {"count": self._count, "turns": self._turns, "mean": self._mean, "square": self._square}
        for dim, sum_DD, basis_DD in zip(self._kept, self._sums, self._bases, strict=True):
            out |= {f"sum{dim}": sum_DD, f"basis{dim}": basis_DD}
        return out


class Method(MatrixMethod):
    """SOAP on the matrices of a model."""

    block = Block
