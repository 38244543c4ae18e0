"""Windows of estimation: the batch passed through again for what a method wants to know of the curvature.

Every window ends in a gradient that the engine has averaged and sharded as any other; the method takes it instead of
a step. So a product with the Gauss-Newton matrix costs what a window costs, at every ZeRO stage and under FSDP2, and
no rank needs a whole vector:

    J v    from the scores at w + e v and w - e v (`difference`), or from two reverse passes (`double_backward`)
    G v    the gradient of <f(w), (d2L/df2) J v>, by the engine's own backward pass and reduction
    H v    from a double backward pass, or from the gradients at w + e v and w - e v

All windows of a step start from one state of the random number generators, so that dropout leaves out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsso.curvature.products import hessian_product, loss_curvature, pushforward, sampled_curvature


@dataclass(frozen=True)
class MicroBatch:
    """What windows of estimation have to know of a micro-batch.

    Attributes:
        terms: loss terms that its losses are divided by, as in `engine.backward`.
        scores: runs the engine; what the loss is a function of, [N, C], one row a loss term.
        loss: sum over terms of the losses of scores, divided by `terms`.
        sampled: the same at labels drawn from the model, see `dsso.curvature.labels`.
    """

    terms: float | Tensor
    scores: Callable[[], Tensor]
    loss: Callable[[Tensor], Tensor]
    sampled: Callable[[Tensor], Tensor]


MicroBatches = Callable[[], Iterable[MicroBatch]]
"""This rank's micro-batches of a window, the same ones at every call."""


def run(engine: Any, batches: MicroBatches) -> None:
    """Run whatever windows of estimation are due before the next window; collective.

    Args:
        engine: of `dsso.initialize`.
        batches: of the window that comes next.

    Raises:
        RunError: the model cannot be differentiated twice, and `products` asks for it.
    """
    while (kind := engine.wants_estimate()) is not None:
        if kind == "gradient_pair":
            for sign in (1.0, -1.0):
                with _same_randomness(engine), engine.displaced(sign):
                    _window(engine, batches, _slope)
            continue
        make: Callable[[MicroBatch, int], Tensor] = _slope
        if kind == "sampled":
            make = _sampled
        elif kind in ("ggn", "ggn_sampled"):
            make = _Product(engine, batches, kind == "ggn_sampled")
        elif kind == "hessian":
            make = _HessianProduct(engine)
        with _same_randomness(engine), _math_attention(engine.twice_differentiated):
            _window(engine, batches, make)


def _window(engine: Any, batches: MicroBatches, make: Callable[[MicroBatch, int], Tensor]) -> None:
    with engine.estimating():
        for index, batch in enumerate(batches()):
            engine.backward(make(batch, index), terms=batch.terms)
            engine.step()


def _slope(batch: MicroBatch, _index: int) -> Tensor:
    return batch.loss(batch.scores())


def _sampled(batch: MicroBatch, _index: int) -> Tensor:
    return batch.sampled(batch.scores())


class _HessianProduct:
    """What has H v of a micro-batch as its gradient, by double backward."""

    def __init__(self, engine: Any) -> None:
        self._parameters, self._vector = engine.whole_direction()

    def __call__(self, batch: MicroBatch, _index: int) -> Tensor:
        return hessian_product(batch.loss(batch.scores()), self._parameters, self._vector)


class _Product:
    """<f(w), (d2L/df2) J v> of a micro-batch."""

    def __init__(self, engine: Any, batches: MicroBatches, sampled: bool) -> None:
        self._sampled = sampled
        self._tangents: list[Tensor] | None = None
        if engine.twice_differentiated:
            self._parameters, self._vector = engine.whole_direction()
        else:
            self._tangents = _tangents(engine, batches)

    def __call__(self, batch: MicroBatch, index: int) -> Tensor:
        f_NC = batch.scores()
        if self._tangents is None:
            t_NC = pushforward(f_NC, self._parameters, self._vector)
        else:
            t_NC = self._tangents[index]
        if self._sampled:
            bent_NC = sampled_curvature(batch.sampled, batch.terms, f_NC, t_NC)
        else:
            bent_NC = loss_curvature(batch.loss, f_NC, t_NC)
        kind = torch.promote_types(f_NC.dtype, torch.float32)
        return (f_NC * bent_NC.to(f_NC.dtype)).sum(dtype=kind)


@torch.no_grad()
def _tangents(engine: Any, batches: MicroBatches) -> list[Tensor]:
    """J v of every micro-batch, by central differences."""
    found: list[list[Tensor]] = []
    for sign in (1.0, -1.0):
        with _same_randomness(engine), engine.displaced(sign):
            found.append([batch.scores().clone() for batch in batches()])
    half = 0.5 / engine.displacement
    # Scores are long and few where a vocabulary is large: the first ones are overwritten.
    return [plus.sub_(minus).mul_(half.to(plus.dtype)) for plus, minus in zip(*found, strict=True)]


@contextmanager
def _same_randomness(engine: Any) -> Iterator[None]:
    """Put the generators back behind a window."""
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _math_attention(needed: bool) -> Any:
    """Fused attention cannot be differentiated twice."""
    if not needed:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH])
