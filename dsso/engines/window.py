"""Accumulation windows of the engines without DeepSpeed: passes, the step at the end, the scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines.base import EngineBase
from dsso.optim._partition import PartitionOptimizer


class WindowEngine(EngineBase):
    """Sums the gradients of a window's micro-batches with weight 1/steps and steps at its end.

    Args:
        module: the unwrapped model.
        optimizer: carries the method.
        device: of this rank.
        gradient_accumulation_steps: micro-batches a window.
        micro_batch_size: examples per rank and micro-batch.
        scheduler: learning-rate scheduler on the optimizer, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        scheduler: Any = None,
    ) -> None:
        super().__init__(module, optimizer, device, gradient_accumulation_steps, micro_batch_size)
        self.scheduler = scheduler
        self._micro = 0

    # -- to be given by the engine ------------------------------------------------------------------------------

    def _begin_pass(self, last: bool) -> None:
        """A backward pass is about to run.

        Args:
            last: of its window.
        """

    def _end_pass(self) -> None:
        """A backward pass has run."""

    def _bring_gradients(self) -> None:
        """Make the gradients of the optimizer's buffers those of the global batch; collective."""

    def _drop_gradients(self) -> None:
        """The step was taken: weights follow the optimizer's buffers, gradients go."""

    # -- the window ---------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        self._before_forward()
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        """True when the next `step()` updates the parameters."""
        return self._micro >= self.gradient_accumulation_steps

    def backward(self, loss: Tensor, terms: float | Tensor | None = None) -> None:
        """Backward pass of one micro-batch; its gradient enters the window with weight 1/steps."""
        self._before_backward(terms)
        self._begin_pass(self._micro + 1 >= self.gradient_accumulation_steps)
        (loss / self.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        self._end_pass()
        self._micro += 1

    def step(self) -> None:
        """Optimizer step at the end of a window, else nothing."""
        if not self.is_gradient_accumulation_boundary():
            return
        self._bring_gradients()
        self.optimizer.step()
        self._drop_gradients()
        if self.scheduler is not None and not self._estimating:
            self.scheduler.step()
        self._micro = 0
        self._after_step()
