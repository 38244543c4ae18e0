"""The contract between a method and the optimizer that carries it through any engine.

A `GradientMethod` turns the averaged gradients of the parameters that it takes into updates. It never sees an
engine, a partition or a learning rate: `dsso.optim._partition` brings it whole gradients of the parameters that
this rank owns, clips what comes back and applies the base method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dsso.errors import RunError
from dsso.optim._rules import Rule


def state_like(model: nn.Module, device: torch.device) -> Tensor:
    """A zero in what a method keeps its state in: fp32, or fp64 for a model that trains in it.

    Args:
        model: the unwrapped model.
        device: where state lives.
    """
    doubles = any(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
    return torch.zeros((), dtype=torch.float64 if doubles else torch.float32, device=device)


def take_over(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Copy a checkpoint's tensors into those of the same names.

    Args:
        own: this rank's, overwritten.
        tensors: of the checkpoint; others are ignored.
        remedy: what to look at where one does not fit.

    Raises:
        RunError: when one is missing or has another shape.
    """
    for name, mine in own.items():
        if name not in tensors:
            raise RunError("the checkpoint lacks state of the method", where=name, remedy=remedy)
        found = tensors[name]
        if found.shape != mine.shape:
            raise RunError(
                "the checkpoint's state has another shape",
                where=name,
                got=tuple(found.shape),
                allowed=str(tuple(mine.shape)),
                remedy=remedy,
            )
        mine.copy_(found)


class GradientMethod(ABC):
    """Turns gradients into updates.

    Attributes:
        workers: ranks that compute the update of each parameter that the method takes, its owner first, in model
            order; the same on every rank.
        owners: the first of them.
        rest: every other trainable parameter, with the reason why the base method takes it.
        taken: parameters without an owner that it takes on every rank.
        damping_factor: on the damping, where the recipe has it follow the loss.
    """

    workers: dict[str, tuple[int, ...]]
    owners: dict[str, int]
    rest: dict[str, str]
    taken: frozenset[str] = frozenset()
    damping_factor: float = 1.0

    @abstractmethod
    def begin_window(self, step: int, retry: bool) -> None:
        """An accumulation window starts.

        Args:
            step: number of the optimizer step that it leads to.
            retry: statistics are wanted in any case: an earlier refresh was lost or came too early.
        """

    @abstractmethod
    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """A micro-batch's backward pass is about to run.

        Args:
            scale: what brings its output gradients to the scale of one loss term.
            terms: loss terms that its loss was divided by.
            last: no other micro-batch follows in this window.
        """

    @abstractmethod
    def sampled_pass(self) -> AbstractContextManager[None]:
        """Context in which a pass on sampled labels is measured."""

    @abstractmethod
    def wants_sampled_pass(self) -> bool:
        """True when the micro-batch that just ran must be followed by a pass on sampled labels."""

    @abstractmethod
    def measured_badly(self) -> Tensor | None:
        """Whether this rank's statistics of the window are not finite; None when none were taken."""

    @abstractmethod
    def update(self, step: int, bad: Tensor | None) -> None:
        """Take the window's statistics into the state, refresh what is due; collective, no host synchronization.

        Args:
            step: number of the optimizer step.
            bad: boolean scalar, the same on all ranks: drop the window's statistics. None: no statistics.
        """

    @abstractmethod
    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Updates of the parameters that this rank owns.

        Args:
            gradients: flattened, averaged gradients of the parameters that this rank works on, by name.

        Returns:
            The updates, flattened, by the same names; and three figures, [3], that are summed over ranks with the
            step's norms: blocks that have a gradient but no usable preconditioner yet, refreshes that failed in this
            step, and blocks without a usable preconditioner.
        """

    @abstractmethod
    def health(self) -> dict[str, float]:
        """Figures for a logging step; may synchronize with the device."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of this rank's state, counted from its tensors."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """State of the blocks that this rank has to write, by a name that does not depend on the rank."""

    @abstractmethod
    def wants(self, name: str) -> bool:
        """Whether this rank needs the tensor that `state_tensors` of some rank had under that name."""

    @abstractmethod
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the blocks that this rank owns; tensors of other blocks are ignored.

        Raises:
            RunError: when a block of this rank is missing or has another shape.
        """

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Host-side state as JSON.

        Returns:
            `common`, the same on every rank, and `owned`: by block, what its owner knows.
        """

    @abstractmethod
    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned, with `owned` of all ranks together."""

    @abstractmethod
    def rules(self) -> dict[str, Rule]:
        """Base rule of every trainable parameter, by name."""

    @abstractmethod
    def close(self) -> None:
        """Take hooks off the model."""
