"""One device, no launcher, no process group: for debugging, and the reference of every other engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsso.engines.window import WindowEngine
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel.fragments import Span


class SingleEngine(WindowEngine):
    """Runs a model in one process.

    Weights below fp32 get an fp32 master copy, which is what the optimizer steps.

    Args:
        module: the model, on its device already.
        optimizer: carries the method; it is attached here.
        device: where the model lives.
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
        super().__init__(module, optimizer, device, gradient_accumulation_steps, micro_batch_size, scheduler)
        self._agree()
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for p in self._parameters.values():
            if not p.is_contiguous():
                p.data = p.data.contiguous()
        self._masters = {
            n: p if p.dtype in (torch.float32, torch.float64) else p.detach().to(torch.float32).clone()
            for n, p in self._parameters.items()
        }
        spans = [Span(n, 0, p.numel(), i, 0) for i, (n, p) in enumerate(self._parameters.items())]
        optimizer.attach(
            list(self._masters.values()), spans, {n: p.numel() for n, p in self._parameters.items()}
        )

    def _agree(self) -> None:
        """Start from the same weights on every rank; one process does."""

    def _end_pass(self) -> None:
        """Sum the gradients of weights below fp32 over the window in fp32."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def _drop_gradients(self) -> None:
        self.publish_weights()
        for name, parameter in self._parameters.items():
            self._masters[name].grad = parameter.grad = None

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Round the masters to the model's weights."""
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def close(self) -> None:
        """Take the hooks off the model."""
        self._close_hooks()
