"""Damping that follows how far a method's model of the loss can be trusted, by the rule of Levenberg and Marquardt.

Every `interval` steps a step d is judged on its own batch, with G the Gauss-Newton matrix of the batch:

    rho = (L(w + d) - L(w)) / (<g, d> + d^T G d / 2)

Above 3/4 the damping falls by `rate` ^ interval, below 1/4 it rises by as much, and also where the model itself has the
loss rise: the step has gone past the minimum. What is judged is the step as it was
taken: clipped, times the learning rate, with momentum, decay and the base method's part.

Sources: Martens 2010, *Deep learning via Hessian-free optimization*, section 4.1; Martens and Grosse 2015, section 6.5.
Deviation: the quadratic model has the exact Gauss-Newton matrix, so one rule serves every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsso.errors import RunError
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred

LOW, HIGH = 0.25, 0.75
"""Between these the damping stays."""


class Trust:
    """The factor on the damping, and what it follows.

    Args:
        interval: steps between two that are judged.
        rate: below 1, by step.
        least: smallest factor.
        most: largest factor.
        difference: length of the displacement for J d, over 1 + that of the weights.

    Attributes:
        factor: on the method's damping; known one judgement late, the same on every rank.
        ratio: rho that was known last; NaN before.
    """

    def __init__(self, interval: int, rate: float, least: float, most: float, difference: float) -> None:
        self.interval, self._rate, self._least, self._most = interval, rate, least, most
        self._difference = difference
        self.factor, self.ratio = 1.0, math.nan
        self._told = Deferred()
        self._before: list[Tensor] | None = None
        self._buffers: list[Tensor] = []
        self._weight = 1.0

    @property
    def open(self) -> bool:
        """The last step has to be judged."""
        return self._before is not None

    def remember(self, step: int, buffers: Sequence[Tensor], weight: float) -> None:
        """Keep the weights that a step starts from, where it is one to be judged.

        Args:
            step: its number.
            buffers: the weights of this rank; their values afterwards are where the step ended.
            weight: of this rank in sums over all ranks.

        Raises:
            RunError: the step before it has not been judged.
        """
        if self._before is not None:
            raise RunError(
                f"step {step - 1} was not judged, and adaptive_damping follows what it came to",
                where="engine.step",
                remedy="call dsso.engines.estimates.judge after every window",
            )
        self._buffers, self._weight = [buffer.detach() for buffer in buffers], weight
        if step % self.interval == self.interval - 1:
            self._before = [buffer.clone() for buffer in self._buffers]

    def displacement(self) -> Tensor:
        """Share of the step at which J d is taken, a scalar; collective."""
        assert self._before is not None
        steps = [now - old for now, old in zip(self._buffers, self._before, strict=True)]
        norms = [torch.stack(torch._foreach_norm(one)).square().sum() for one in (self._before, steps)]
        lengths = collectives.all_sum(torch.stack(norms) * self._weight).sqrt()
        return self._difference * (1 + lengths[0]) / lengths[1].clamp_min(torch.finfo(lengths.dtype).tiny)

    @contextmanager
    def at(self, share: float | Tensor) -> Iterator[None]:
        """Within it the weights are so large a share of the step away from where it began.

        Args:
            share: 0 where it began, 1 where it ended, negative ones lie before.
        """
        assert self._before is not None
        kept = [buffer.clone() for buffer in self._buffers]
        for buffer, old, now in zip(self._buffers, self._before, kept, strict=True):
            buffer.copy_(old + (now - old) * share)
        try:
            yield
        finally:
            for buffer, now in zip(self._buffers, kept, strict=True):
                buffer.copy_(now)

    def judge(self, sums: Tensor) -> None:
        """Take in what the step came to; collective.

        Args:
            sums: of this rank: loss before and after, <g, d>, d^T G d, [4].
        """
        before, after, slope, bend = collectives.all_sum(sums).unbind()
        self._told.push(torch.stack([after - before, slope + bend / 2]))
        self._before = None

    def settle(self) -> float:
        """Read the last judgement, if there is one; the factor."""
        told = self._told.pop()
        if told is not None:
            change, predicted = told
            self.ratio = change / predicted if predicted else math.nan
            power = self._rate**self.interval
            if predicted > 0 or self.ratio < LOW:
                self.factor = min(self.factor / power, self._most)
            elif self.ratio > HIGH:
                self.factor = max(self.factor * power, self._least)
        return self.factor

    def state(self) -> dict[str, Any]:
        """As JSON."""
        ratio = self.ratio if math.isfinite(self.ratio) else None
        told = self._told.peek()
        if told is not None and not all(map(math.isfinite, told)):
            told = None
        return {"factor": self.factor, "ratio": ratio, "told": told}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` returned; None: nothing was kept."""
        if state is None:
            return
        self.factor = float(state["factor"])
        self.ratio = math.nan if state["ratio"] is None else float(state["ratio"])
        if state["told"] is not None:
            self._told.push(torch.tensor(state["told"]))
