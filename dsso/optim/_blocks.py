"""The contract of a method on blocks of matrices: what a stack of them keeps, takes in, renews and does.

Legend of shape suffixes: `K` blocks of a stack; `KS` a stack of tensors of the blocks' sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsso.linalg import triangle


@dataclass(frozen=True)
class BlockCost:
    """What a block takes.

    Attributes:
        elements: numbers in fp32 that its owner keeps.
        refresh: multiply-adds of a refresh.
        step: multiply-adds of every step.
    """

    elements: int
    refresh: float
    step: float


@dataclass(frozen=True)
class Take:
    """Whether a step's gradients are taken in, as numbers for averages; the same for all blocks.

    Attributes:
        flag: boolean scalar tensor: false leaves all state as it is.
        one: 1, on the device and in the dtype of the state.
    """

    flag: Tensor
    one: Tensor
    _known: dict[float, Tensor] = field(default_factory=dict)

    def keep(self, beta: float) -> Tensor:
        """Weight of what there was: beta, or 1. The weight of what is new needs none: a gradient not taken is zero."""
        if beta not in self._known:
            self._known[beta] = torch.where(self.flag, beta * self.one, self.one)
        return self._known[beta]

    def only(self, x: Tensor) -> Tensor:
        """The gradients where they are taken, else zeros."""
        if triangle.asking_is_free(self.flag):
            return x if self.flag else torch.zeros_like(x)
        return torch.where(self.flag, x, 0.0)

    @property
    def count(self) -> Tensor:
        """1 or 0."""
        return self.flag.to(self.one.dtype)


def fresh(beta: float) -> float:
    """Weight of what is new in an average: 1 - beta, or 1 where beta is 1 and nothing is forgotten."""
    return 1.0 if beta == 1 else 1.0 - beta


class MatrixBlocks(ABC):
    """State and mathematics of a stack of blocks with the same sides.

    Small blocks are stacked, because many small operations take longer than one on all of them; each is refreshed by
    itself.

    Args:
        count: of blocks, K.
        sides: of each.
        config: of the method.
        like: gives device and dtype.

    Attributes:
        usable: for each whether there is a preconditioner; host-side, set by `refresh` and by a checkpoint.
        seeds: for numbers that a block draws; functions of its key alone.
    """

    refreshed_last: ClassVar[bool] = False
    """Refreshed after it has acted: the preconditioner of a step has not seen the step's gradient."""

    def __init__(self, count: int, sides: tuple[int, ...], config: Any, like: Tensor) -> None:
        self.usable = [False] * count
        self.seeds = [0] * count
        self._shape = (count, *sides)
        self._like = like

    def zeros(self, *shape: int) -> Tensor:
        """State of a shape for every block."""
        return self._like.new_zeros(self._shape[0], *shape)

    def eye(self, side: int) -> Tensor:
        """An identity for every block."""
        eye_DD = torch.eye(side, dtype=self._like.dtype, device=self._like.device)
        return eye_DD.repeat(self._shape[0], 1, 1)

    def mask(self) -> Tensor | None:
        """Which blocks are usable, [K] and broadcasting over them; None where all are."""
        if all(self.usable):
            return None
        found = torch.tensor(self.usable, device="cpu").to(self._like.device, non_blocking=True)
        return found.view(-1, *(1 for _ in self._shape[1:]))

    @staticmethod
    @abstractmethod
    def cost(sides: tuple[int, ...], config: Any) -> BlockCost:
        """What a block of such sides takes."""

    @abstractmethod
    def average(self, gradient_KS: Tensor, take: Take) -> None:
        """Take in gradients.

        Args:
            gradient_KS: of the blocks; zero where they are not taken.
            take: whether they are.
        """

    @abstractmethod
    def refresh(self, index: int) -> bool:
        """Renew the preconditioner of one block; whether that failed, in which case the last good one stays."""

    @abstractmethod
    def act(self, gradient_KS: Tensor, step: int) -> Tensor:
        """The updates, before clipping and the learning rate, of the blocks' shape.

        Args:
            gradient_KS: as `average` got it.
            step: number of the optimizer step.
        """

    def ready(self, index: int, step: int) -> bool:
        """Whether the update is what the method means it to be: nothing is waited for."""
        return self.usable[index]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All state, stacked."""

    def state(self, index: int) -> dict[str, Tensor]:
        """All tensors of one block, as views."""
        return {name: stacked[index] for name, stacked in self.tensors().items()}
