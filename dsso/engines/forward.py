"""The engine of methods that need only losses, on one device or on replicas: no gradients, no graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines.base import EngineBase
from dsso.engines.shown import MasterWeights, SwappedWeights, weights_of
from dsso.errors import RunError
from dsso.optim._probes import ForwardOptimizer
from dsso.parallel import collectives
from dsso.parallel.averaging import same_everywhere

_TOLERANCE = 1e-5
"""Two evaluations of the same batch with the same weights may differ so much, relatively."""


class ForwardEngine(EngineBase):
    """Evaluates a model and moves its weights; with several ranks each has all weights and its share of the batch.

    Args:
        module: the model, on its device already; rank 0's weights are given to all.
        optimizer: carries the method; it is attached here.
        device: of this rank.
        gradient_accumulation_steps: micro-batches that a closure is expected to evaluate.
        micro_batch_size: examples per rank and micro-batch.
        scheduler: learning-rate scheduler on the optimizer, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: ForwardOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        scheduler: Any = None,
    ) -> None:
        carrier: Any = optimizer
        super().__init__(module, carrier, device, gradient_accumulation_steps, micro_batch_size)
        self.scheduler = scheduler
        same_everywhere(p.detach() for p in chain(module.parameters(), module.buffers()))
        self._weights: MasterWeights | SwappedWeights = weights_of(module)
        self._forward: ForwardOptimizer = optimizer
        optimizer.attach(self._weights, {piece.name: piece.base.numel() for piece in self._weights.pieces})
        self._trusted = False
        self._plain = True
        self._size = 0

    @property
    def name(self) -> str:
        """Name of the engine, as a recipe writes it."""
        return "single" if self.world_size == 1 else "ddp"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        return self.module(*args, **kwargs)

    def table(self) -> list[dict[str, Any]]:
        """Rows `parameter, shape, method, owner, reason` for every trainable parameter."""
        method = self._forward.method_name.upper()
        return [
            {"parameter": name, "shape": shape, "method": method, "owner": None, "reason": ""}
            for name, shape in self.shapes.items()
        ]

    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One step.

        Args:
            closure: evaluates this rank's share of the global batch and returns the sum of its losses and the number
                of loss terms, [2]. It is called several times and has to give the same for the same weights.
            value: what is lowered where it is not the loss: from sums of all ranks, [evaluations, m], to
                [evaluations]. The closure then returns this rank's part of the m sums, [m], always as many.

        Returns:
            Mean over the evaluations of what is lowered, a scalar tensor.

        Raises:
            RunError: no closure, one that is random, or one that returns something else.
        """
        if closure is None:
            raise RunError(
                "this method takes steps from losses alone",
                where="engine.step",
                remedy="call engine.step(closure) with a closure that returns the sum of the losses and the number of"
                " loss terms",
            )
        self._plain = value is None
        with self._evaluating():
            self._check(closure)
            loss = self._forward.step(lambda: self._two(closure()), value)
        if self.scheduler is not None:
            self.scheduler.step()
        self._after_step()
        return loss

    def _two(self, found: Tensor) -> Tensor:
        """What a closure has returned, checked."""
        if not self._plain:
            return self._several(found)
        if not isinstance(found, Tensor) or found.shape != (2,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RunError(
                "the closure must return two numbers: the sum of the losses and the number of loss terms",
                where="engine.step",
                got=shape,
                allowed="a tensor of shape (2,)",
            )
        return found

    def _several(self, found: Tensor) -> Tensor:
        """Sums for `value`; on their number all ranks agree once."""
        size = found.numel() if isinstance(found, Tensor) and found.dim() == 1 else 0
        if not self._size:
            sizes = set(collectives.gather_objects(size))
            self._size = size if len(sizes) == 1 else 0
        if not size or size != self._size:
            raise RunError(
                "the closure must return sums for `value`, on every rank and always as many",
                where="engine.step",
                got=tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__,
                allowed=f"a tensor of shape ({self._size or 'm'},)",
            )
        return found

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout and no graph; every module's mode is put back."""
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for part, mode in modes:
                part.training = mode

    def _check(self, closure: Callable[[], Tensor]) -> None:
        """Once: two evaluations of one batch must agree, or slopes would be made of noise; who is never met is told."""
        if self._trusted:
            return
        self._trusted = True
        first = self._two(closure()).double()
        if isinstance(self._weights, SwappedWeights):
            with self._weights.meeting() as met:
                second = self._two(closure()).double()
            met = met.union(*collectives.gather_objects(met))
            unmet = {piece.name for piece in self._weights.pieces} - met
            self._weights.leave(unmet)
            if unmet and self.rank == 0:
                warnings.warn(
                    f"{len(unmet)} trained parameter(s) stay as they are, because no forward pass goes through the"
                    f" modules that hold them: {', '.join(sorted(unmet)[:5])}{' …' if len(unmet) > 5 else ''}",
                    stacklevel=3,
                )
        else:
            second = self._two(closure()).double()
        if torch.isfinite(first).all() and (first - second).abs().max() > _TOLERANCE * first.abs().max():
            raise RunError(
                "two evaluations of the same batch differ: something random is on in evaluation mode",
                where="engine.step",
                got=f"{first[0].item()!r} and {second[0].item()!r}",
                remedy="switch off dropout that ignores module.eval(), or draw the batch outside the closure",
            )

    def backward(self, loss: Tensor, terms: float | Tensor | None = None) -> None:
        """There are no gradients.

        Raises:
            RunError: always.
        """
        raise RunError(
            "this method needs no gradients",
            where="engine.backward",
            remedy="call engine.step(closure) alone",
        )

    def is_gradient_accumulation_boundary(self) -> bool:
        """Every step is one."""
        return True

    def publish_weights(self) -> None:
        """Bring the model's weights in line with master copies."""
        self._weights.publish()

    def close(self) -> None:
        """Take the hooks off the model."""
        if isinstance(self._weights, SwappedWeights):
            self._weights.close()
        self._close_hooks()
