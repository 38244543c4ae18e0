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

from dsso.curvature.layer_blocks import LayerBlocks, root_column
from dsso.curvature.products import (
    hessian_product,
    loss_curvature,
    pushforward,
    sampled_curvature,
    with_gradient,
)


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


Bend = Callable[[MicroBatch, Tensor, Tensor], Tensor]
"""(d2L/df2) t of a micro-batch, scores and t."""
MicroBatches = Callable[[], Iterable[MicroBatch]]
"""This rank's micro-batches of a window, the same ones at every call."""


def run(engine: Any, batches: MicroBatches) -> None:
    """Run whatever windows of estimation are due before the next window; collective.

    Args:
        engine: of `dsso.initialize`.
        batches: of the window that comes next.

    Raises:
        RunError: the model cannot be differentiated twice, and `products` asks for it; at the first call.
    """
    if engine.twice_differentiated and not engine.tried:
        _try(engine, batches)
        engine.tried = True
    while (kind := engine.wants_estimate()) is not None:
        if kind == "gradient_pair":
            for sign in (1.0, -1.0):
                with _same_randomness(engine), engine.displaced(sign):
                    _window(engine, batches, _slope)
            continue
        make: Callable[[MicroBatch], Tensor] = _slope
        if kind == "sampled":
            make = _sampled
        elif kind == "ggn_column":
            make = _Column(engine.layer_blocks)
        elif kind != "gradient":
            bend = _BENDS[kind]
            twice = bend is None or engine.twice_differentiated
            make = _Twice(engine, bend) if twice else _Differences(engine, batches, bend)
        with _same_randomness(engine), _math_attention(engine.twice_differentiated):
            _window(engine, batches, make)


def _try(engine: Any, batches: MicroBatches) -> None:
    """Find out at the first step whether the model can be differentiated twice, not when it is asked for first."""
    engine.need_whole_weights()
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    nothing = [torch.zeros_like(p) for p in parameters]
    with _same_randomness(engine), _math_attention(True), engine.unwrapped():
        batch = next(iter(batches()))
        f_NC = batch.scores()
        pushforward(f_NC, parameters, nothing)
        hessian_product(batch.loss(f_NC), parameters, nothing)


def _exactly(batch: MicroBatch, f_NC: Tensor, t_NC: Tensor) -> Tensor:
    return loss_curvature(batch.loss, f_NC, t_NC)


def _in_one_draw(batch: MicroBatch, f_NC: Tensor, t_NC: Tensor) -> Tensor:
    return sampled_curvature(batch.sampled, batch.terms, f_NC, t_NC)


_BENDS: dict[str, Any] = {"ggn": _exactly, "ggn_sampled": _in_one_draw, "hessian": None}
"""What multiplies J v, by what is wanted."""


def _window(engine: Any, batches: MicroBatches, make: Callable[[MicroBatch], Tensor]) -> None:
    with engine.estimating():
        for batch in batches():
            engine.backward(make(batch), terms=batch.terms)
            engine.step()


def _slope(batch: MicroBatch) -> Tensor:
    return batch.loss(batch.scores())


def _sampled(batch: MicroBatch) -> Tensor:
    return batch.sampled(batch.scores())


class _Column:
    """What pulls a column of a root of the losses' curvature back, <f(w), s>."""

    def __init__(self, blocks: LayerBlocks) -> None:
        self._blocks, self._column = blocks, blocks.done

    def __call__(self, batch: MicroBatch) -> Tensor:
        f_NC = batch.scores()
        self._blocks.see_scores(f_NC)
        return (f_NC * root_column(batch.loss, f_NC, self._column).to(f_NC.dtype)).sum()


class _Twice:
    """What has H v or G v of a micro-batch as its gradient, by double backward on the model itself."""

    def __init__(self, engine: Any, bend: Bend | None) -> None:
        self._engine, self._bend = engine, bend
        self._parameters, self._vector = engine.whole_direction()

    def __call__(self, batch: MicroBatch) -> Tensor:
        with self._engine.unwrapped():
            f_NC = batch.scores()
        if self._bend is None:
            found = hessian_product(batch.loss(f_NC), self._parameters, self._vector)
        else:
            t_NC = pushforward(f_NC, self._parameters, self._vector)
            bent_NC = self._bend(batch, f_NC, t_NC).to(f_NC.dtype)
            found = torch.autograd.grad(f_NC, self._parameters, bent_NC, allow_unused=True)
        return with_gradient(self._parameters, found)


class _Differences:
    """<f(w), (d2L/df2) J v> of a micro-batch, J v by central differences."""

    def __init__(self, engine: Any, batches: MicroBatches, bend: Bend) -> None:
        # The last comes first: each goes when it has been used.
        self._bend, self._tangents = bend, _tangents(engine, batches)[::-1]

    def __call__(self, batch: MicroBatch) -> Tensor:
        f_NC = batch.scores()
        bent_NC = self._bend(batch, f_NC, self._tangents.pop())
        return (f_NC * bent_NC.detach().to(f_NC.dtype)).sum()


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


@torch.no_grad()
def judge(engine: Any, batches: MicroBatches) -> None:
    """Compare what a step did to the loss of its batch with what its quadratic model says, where damping follows that.

    Args:
        engine: whose step has just been taken.
        batches: of that step.
    """
    if not engine.wants_judgement:
        return
    share = engine.optimizer.trust.displacement()
    every = []
    for where in (0.0, None, share, -share):
        # Where it ended, the weights are.
        place = nullcontext() if where is None else engine.along_the_step(where)
        with _same_randomness(engine), place:
            every.append([batch.scores().clone() for batch in batches()])
    sums = share.new_zeros(4)
    for batch, before, after, plus, minus in zip(batches(), *every, strict=True):
        t_NC = plus.sub_(minus).mul_((0.5 / share).to(plus.dtype))
        with torch.enable_grad():
            leaf_NC = before.detach().requires_grad_(True)
            (slope_NC,) = torch.autograd.grad(batch.loss(leaf_NC), leaf_NC)
        bent_NC = loss_curvature(batch.loss, before, t_NC)
        found = (batch.loss(before), batch.loss(after), (slope_NC * t_NC).sum(), (bent_NC * t_NC).sum())
        sums += torch.stack([one.to(sums) for one in found])
    engine.optimizer.trust.judge(sums)


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
