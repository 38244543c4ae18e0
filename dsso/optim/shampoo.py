"""Shampoo: every side of a block is preconditioned by a root of its own second moment.

For a block with gradient G of sides d_1 .. d_k and its unfoldings G_i (side i against all others),

    S_i <- beta2 S_i + (1 - beta2) G_i G_i^T               (beta2 = 1: S_i + G_i G_i^T)
    M   <- beta1 M + (1 - beta1) G
    U    = M^ x_1 S^_1^(-1/2k) x_2 ... x_k S^_k^(-1/2k)    k sides that are preconditioned; hats: debiased

and, with grafting, U |U_graft| / |U|: the direction is Shampoo's, the length another method's, block by block.

Sources: Gupta, Koren, Singer 2018, algorithm 2 (the method, roots by the order of the tensor); Anil, Gupta, Koren,
Regan, Singer 2020 (grafting, blocks, roots at intervals, coupled Newton); Shi et al. 2023 (exponential averages,
debiasing, filtered gradients). Deviations: what is added to a diagonal is relative to the trace by default, so that it
has no unit and is above rounding, which else decides over the root where data has not reached; of a long and narrow
block (an adapter's) only the short side is preconditioned, with the root that one side asks for.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsso.clip import ClipMode
from dsso.linalg import roots
from dsso.linalg.kron import TINY
from dsso.optim._blocks import BlockCost, MatrixBlocks, Take, fresh
from dsso.optim._matrix import MatrixMethod
from dsso.optim._matrix_config import MatrixConfig
from dsso.optim._second_moment import SecondMoments
from dsso.optim._unfold import along, norms, per_block

__all__ = ["Config", "Method"]


class Config(MatrixConfig):
    """Parameters of Shampoo (`optimizer.params`)."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate; with grafting that of the method whose length is taken."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """m <- momentum m + u on clipped updates, on top of `beta1`."""
    clip: ClipMode = "none"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the norm of the update (`post`), which with Adam's
    grafting is about the root of the number of elements."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the averaged gradient that is preconditioned; 0: the gradient itself."""
    beta2: float = Field(default=0.999, gt=0, le=1)
    """Decay of the second moments; 1: they are summed up."""
    epsilon: float = Field(default=1e-5, gt=0)
    """Added to the diagonal of a second moment before its root is taken."""
    epsilon_mode: Literal["relative", "absolute"] = "relative"
    """`relative`: times the trace, of which rounding in float32 takes 1e-7; `absolute`: as it is."""
    exponent: float | None = Field(default=None, gt=0)
    """Of every side; null: 1 over twice the number of sides that are preconditioned."""
    root: Literal["eigh", "newton"] = "eigh"
    """How roots are made; `newton` needs 1 / `exponent` to be a whole number."""
    grafting: Literal["none", "sgd", "adam", "rmsprop", "adagrad"] = "adam"
    """Whose length an update has; `adam` uses beta1 and beta2, `rmsprop` beta2."""
    grafting_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment of `grafting`."""
    start_step: int = Field(default=0, ge=0)
    """Steps up to this one are those of `grafting` alone; statistics are taken from the first."""

    @model_validator(mode="after")
    def _whole_root(self) -> Config:
        if self.root == "newton" and self.exponent is not None and (1 / self.exponent) % 1:
            raise ValueError(
                f"root = newton needs a whole number for 1 / exponent, got {1 / self.exponent:g}"
            )
        return self


class Blocks(MatrixBlocks):
    """Second moments of the sides, their roots, and the moments of grafting."""

    def __init__(self, count: int, sides: tuple[int, ...], config: Config, like: Tensor) -> None:
        super().__init__(count, sides, config, like)
        self._config = config
        self._kept = config.kept_sides(sides)
        self._power = config.exponent or 1 / (2 * len(self._kept))
        self._sums = [SecondMoments(count, sides[dim], dim, like) for dim in self._kept]
        self._roots = [self.eye(sides[dim]) for dim in self._kept]
        self._count = self.zeros()
        self._mean = self.zeros(*sides) if config.beta1 else None
        self._square = self.zeros(*sides) if config.grafting in _SQUARES else None

    @staticmethod
    def cost(sides: tuple[int, ...], config: Any) -> BlockCost:
        """A second moment and a square a side; an eigendecomposition and a product for a root, products for a step."""
        whole = math.prod(sides)
        kept = [sides[dim] for dim in config.kept_sides(sides)]
        extra = whole * (bool(config.beta1) + (config.grafting in _SQUARES))
        return BlockCost(
            elements=sum(SecondMoments.elements(side) + side * side for side in kept) + extra + 1,
            refresh=sum(10.0 * side**3 for side in kept),
            step=sum(2.0 * side * whole for side in kept),
        )

    def average(self, gradient_KS: Tensor, take: Take) -> None:
        """S, M and the second moment of grafting."""
        config = self._config
        self._count.add_(take.count)
        for moments in self._sums:
            moments.add(gradient_KS, take.keep(config.beta2), fresh(config.beta2))
        if self._mean is not None:
            self._mean.mul_(take.keep(config.beta1)).add_(gradient_KS, alpha=fresh(config.beta1))
        if self._square is not None:
            decay = 1.0 if config.grafting == "adagrad" else config.beta2
            self._square.mul_(take.keep(decay)).addcmul_(gradient_KS, gradient_KS, value=fresh(decay))

    def refresh(self, index: int) -> bool:
        """Roots of the debiased second moments; all of them are taken over, or none."""
        config, found = self._config, []
        count = self._count[index]
        if count < 1:
            return False
        scale = 1.0 if config.beta2 == 1 else 1 / (1 - config.beta2**count)
        for moments in self._sums:
            newton = config.root == "newton"
            mean_DD = (moments.whole(index) if newton else moments.lower(index)) * scale
            level = mean_DD.diagonal().sum()
            if not level > TINY:
                return False  # a parameter that no loss has reached yet
            shift = config.epsilon * (level if config.epsilon_mode == "relative" else 1.0)
            if newton:
                root_DD, failed = roots.newton_root(mean_DD, round(1 / self._power), shift)
            else:
                root_DD, failed = roots.inverse_root(mean_DD, self._power, shift)
            if failed:
                return True
            found.append(root_DD)
        for mine_KDD, root_DD in zip(self._roots, found, strict=True):
            mine_KDD[index].copy_(root_DD)
        self.usable[index] = True
        return False

    def act(self, gradient_KS: Tensor, step: int) -> Tensor:
        """The preconditioned, filtered gradient, of the length of grafting."""
        config = self._config
        first = gradient_KS if self._mean is None else self._mean
        debias = torch.ones_like(self._count)
        if self._mean is not None:
            debias = 1 / (1 - config.beta1**self._count).clamp_min(TINY)
        graft = self._graft(gradient_KS, debias)
        waiting = step < config.start_step or not any(self.usable)
        if waiting and graft is not None:
            return graft
        debias = per_block(debias, first)
        if waiting:
            return first * debias
        update = first
        for root_KDD, dim in zip(self._roots, self._kept, strict=True):
            update = along(root_KDD, update, dim)
        # Of a grafted update the length does not matter.
        update = update * (debias if graft is None else norms(graft) / norms(update).clamp_min(TINY))
        mask = self.mask()
        return (
            update if mask is None else torch.where(mask, update, first * debias if graft is None else graft)
        )

    def _graft(self, gradient_KS: Tensor, debias_K: Tensor) -> Tensor | None:
        """Whose length an update has; numbers for whole blocks are brought together before they are multiplied in."""
        config = self._config
        if config.grafting == "none":
            return None
        averaged = self._mean is not None and config.grafting in ("adam", "sgd")
        first = self._mean if averaged and self._mean is not None else gradient_KS
        scale_K = debias_K if averaged else torch.ones_like(debias_K)
        if self._square is None:
            return first * per_block(scale_K, first)
        bias_K = torch.ones_like(self._count)
        if config.beta2 < 1 and config.grafting != "adagrad":
            bias_K = (1 - config.beta2**self._count).clamp_min(TINY).sqrt()
        # m / (sqrt(v / b^2) + e) = b m / (sqrt(v) + e b)
        root = self._square.sqrt().add_(per_block(config.grafting_epsilon * bias_K, first))
        return torch.div(first, root, out=root).mul_(per_block(scale_K * bias_K, first))

    def ready(self, index: int, step: int) -> bool:
        """There are roots, or they are not used yet."""
        return self.usable[index] or step < self._config.start_step

    def tensors(self) -> dict[str, Tensor]:
        """All state."""
        out = {"count": self._count}
        for moments, root_KDD in zip(self._sums, self._roots, strict=True):
            out |= {f"sum{moments.dim}": moments.tensor, f"root{moments.dim}": root_KDD}
        if self._mean is not None:
            out["mean"] = self._mean
        if self._square is not None:
            out["square"] = self._square
        return out


_SQUARES = ("adam", "rmsprop", "adagrad")


class Method(MatrixMethod):
    """Shampoo on the matrices of a model."""

    block = Blocks
