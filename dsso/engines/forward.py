"""The engine of methods that need only losses: no gradients, no graph. Here on one device or on replicas.

ZeRO's stages 0 to 2 are replicas as well: what stages 1 and 2 shard, gradients and the optimizer's state, is not there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dsso.engines.base import EngineBase
from dsso.engines.digest import digest
from dsso.engines.shown import MasterWeights, meeting, trained, weights_of
from dsso.errors import RecipeError, RunError
from dsso.optim import resolve
from dsso.optim._probes import ForwardOptimizer
from dsso.parallel import collectives, noise
from dsso.parallel.averaging import same_everywhere
from dsso.seedlog import Start

_TOLERANCE = 1e-5
"""Two evaluations of the same batch with the same weights may differ so much, relatively."""


def _config(module: ModuleType, start: Start) -> Any:
    """Parameters that a seed log was written with; JSON has lists where some fields are tuples."""
    try:
        return module.Config.model_validate_json(json.dumps(start.params))
    except ValidationError as error:
        raise RunError(
            f"the parameters of the log are not those of this method ({error.errors()[0]['msg']})",
            where="seed log",
            remedy="use the version of dsso that wrote it",
        ) from None


class ForwardEngine(EngineBase):
    """Evaluates a model and moves its weights; with several ranks each has all weights and its share of the batch.

    Args:
        module: the model, on its device already; rank 0's weights are given to all.
        optimizer: carries the method; it is attached here.
        device: of this rank.
        gradient_accumulation_steps: micro-batches that a closure is expected to evaluate.
        micro_batch_size: examples per rank and micro-batch.
        scheduler: learning-rate scheduler on the optimizer, or None.
        stage: ZeRO stage of the recipe, where it asks for DeepSpeed.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: ForwardOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        scheduler: Any = None,
        stage: int | None = None,
    ) -> None:
        carrier: Any = optimizer
        super().__init__(module, carrier, device, gradient_accumulation_steps, micro_batch_size)
        self.scheduler = scheduler
        self._stage = stage
        self._forward: ForwardOptimizer = optimizer
        sizes = {name: parameter.numel() for name, parameter in trained(module).items()}
        noise.agree(device)
        self._weights: Any = self._hold(module)
        self._check_spread(sizes)
        optimizer.attach(self._weights, sizes)
        self._trusted = False
        self._plain = True
        self._size = 0

    def _check_spread(self, sizes: Mapping[str, int]) -> None:
        """Refuse directions of its own for every rank where ranks write the slices that others compute with."""
        cut = any(sizes[piece.name] != piece.base.numel() for piece in self._weights.pieces)
        anywhere = any(collectives.gather_objects(cut))
        if self._forward.forward_method.spread and anywhere and isinstance(self._weights, MasterWeights):
            raise RecipeError(
                "every rank would need weights of its own, and they are written in slices that all compute with",
                where="optimizer.params.spread",
                got=True,
                allowed="replicas (ddp, ZeRO 0 to 2), or fsdp2 (in fp32, or with rounding stochastic) with a method"
                " whose directions have no state",
                remedy="set optimizer.params.spread to false, or change the engine",
            )

    def _hold(self, module: nn.Module) -> Any:
        """Bring the model to this rank; what the method may see and move of its weights."""
        same_everywhere(p.detach() for p in chain(module.parameters(), module.buffers()))
        return weights_of(module, self._forward.forward_method.stochastic)

    @property
    def stage(self) -> int | None:
        """ZeRO stage, where there are stages."""
        return self._stage

    @property
    def rounding(self) -> str:
        """How steps reach weights of 16 bits, as a recipe writes it."""
        return "stochastic" if self._forward.forward_method.stochastic else "nearest"

    @property
    def name(self) -> str:
        """Name of the engine, as a recipe writes it."""
        if self._stage is not None:
            return "deepspeed"
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
            closure: evaluates this rank's share of the global batch (all of it, where the method spreads its
                directions over the ranks) and returns the sum of its losses and the number of loss terms, [2]. It is
                called several times and has to give the same for the same weights.
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
        with meeting(self.module) as found:
            second = self._two(closure()).double()
        met = found.union(*collectives.gather_objects(found))
        unmet = {piece.name for piece in self._weights.pieces} - met
        self.leave(unmet)
        if unmet and self.rank == 0:
            warnings.warn(
                f"{len(unmet)} trained parameter(s) stay as they are, because no forward pass goes through the"
                f" modules that hold them: {', '.join(sorted(unmet)[:5])}{' …' if len(unmet) > 5 else ''}",
                stacklevel=3,
            )
        if torch.isfinite(first).all() and (first - second).abs().max() > _TOLERANCE * first.abs().max():
            raise RunError(
                "two evaluations of the same batch differ: something random is on in evaluation mode",
                where="engine.step",
                got=f"{first[0].item()!r} and {second[0].item()!r}",
                remedy="switch off dropout that ignores module.eval(), or draw the batch outside the closure",
            )

    def leave(self, names: Collection[str]) -> None:
        """Move all trained parameters but these: a step along a direction that no loss has felt is one at random.

        Args:
            names: cleaned ones.
        """
        self._weights.pieces = [replace(p, moved=p.name not in names) for p in self._weights.pieces]

    @property
    def left(self) -> tuple[str, ...]:
        """Names of trained parameters that are not moved; known after the first step."""
        return tuple(piece.name for piece in self._weights.pieces if not piece.moved)

    @property
    def record(self) -> dict[str, Any]:
        """What is needed to take the last step again, see `dsso.seedlog`."""
        return self._forward.record

    def wants_estimate(self) -> None:
        """Never: methods from forward passes measure along their own directions."""
        return

    def digest(self) -> str:
        """A number that stands for all weights, see `dsso.engines.digest`; collective.

        Raises:
            RunError: two ranks that should hold the same do not.
        """
        return digest(self._forward)

    def replay(self, steps: Iterable[tuple[Start, Mapping[str, Any]]]) -> None:
        """Take steps again from a seed log, without evaluating anything; collective.

        Args:
            steps: from `SeedLog.between`.

        Raises:
            RunError: the weights are others than those that the log was written with.
        """
        own = self._forward.forward_method
        module, taken = resolve(self._forward.method_name), None
        try:
            for start, record in steps:
                if start is not taken:
                    self.leave(start.left)
                    # The log says what the parameters were; the recipe may have others by now.
                    self._forward.forward_method = module.Method(_config(module, start))
                    self._forward.forward_method.adopt(own)
                    taken = start
                self._forward.replay(record)
                if self.scheduler is not None:
                    self.scheduler.step()
                self._after_step()
                if "digest" in record and record["digest"] != self.digest():
                    raise RunError(
                        f"the weights after step {record['step']} are not those of the run",
                        where="seed log",
                        remedy="replay with the same start weights, and on the same kind of device unless"
                        " optimizer.params.noise is 'rademacher'",
                    )
        finally:
            self._forward.forward_method = own
            self.publish_weights()

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
        self._weights.close()
        self._close_hooks()
