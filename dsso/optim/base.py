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

from torch import Tensor

from dsso.optim._rules import Rule


class GradientMethod(ABC):
    """Turns gradients into updates.

    Attributes:
        owners: rank that owns each parameter that the method takes, in model order; the same on every rank.
        rest: every other trainable parameter, with the reason why the base method takes it.
    """

    owners: dict[str, int]
    rest: dict[str, str]

    @abstractmethod
    def begin_window(self, step: int, retry: bool) -> None:
        """An accumulation window starts.

        Args:
            step: number of the optimizer step that it leads to.
            retry: statistics are wanted in any case: an earlier refresh was lost or came too early.
        """

    @abstractmethod
    def before_backward(self, scale: float | Tensor, terms: float | Tensor) -> None:
        """A micro-batch's backward pass is about to run.

        Args:
            scale: what brings its output gradients to the scale of one loss term.
            terms: loss terms that its loss was divided by.
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
            gradients: flattened, averaged gradients by parameter name.

        Returns:
            The updates, flattened, by the same names; and the number of blocks that have a gradient but no usable
            preconditioner yet, a scalar tensor.
        """

    @abstractmethod
    def health(self) -> dict[str, float]:
        """Figures for a logging step; may synchronize with the device."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of this rank's state, counted from its tensors."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """State of the blocks that this rank owns, by a name that does not depend on the rank."""

    @abstractmethod
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the blocks that this rank owns; tensors of other blocks are ignored.

        Raises:
            RunError: when a block of this rank is missing or has another shape.
        """

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Host-side state as JSON: `{"common": {...}, "owned": {block: {...}}}`.

        `common` is the same on every rank; `owned` is about the blocks that this rank owns, by their names.
        """

    @abstractmethod
    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned, with `owned` of all the ranks that wrote it.

        There may have been another number of them: each rank looks up the blocks that it owns now, and one that is
        not listed has nothing to tell.
        """

    @abstractmethod
    def rules(self) -> dict[str, Rule]:
        """Base rule of every trainable parameter, by name."""

    @abstractmethod
    def close(self) -> None:
        """Take hooks off the model."""
