"""Methods that learn from windows of estimation, and what such windows need of a rank's pieces.

Curvature comes from windows of their own (`dsso.engines.estimates`), whose averaged gradient is handed to the method
instead of being stepped along. Products with curvature are taken along a direction that lies in pieces, as the weights
do, so that no engine has to hold a whole vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from dsso.curvature.layer_blocks import LayerBlocks
from dsso.errors import RunError
from dsso.optim._gradient_config import Products
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives, noise
from dsso.parallel.fragments import FragmentExchange, SpanTable

Estimate = Literal["sampled", "gradient", "gradient_pair", "hessian", "ggn", "ggn_sampled", "ggn_column"]
"""What a window of estimation is to come to: the gradient at sampled labels; the gradient; gradients at the two weights
that are displaced along the method's direction; the Hessian, or the Gauss-Newton matrix, times that direction; what a
column of a root of the losses' curvature is pulled back to."""
State = Mapping[str, Tensor]
"""What a method keeps of a piece, by name."""


class EstimatingMethod(GradientMethod):
    """A method with windows of estimation.

    Attributes:
        probed: names of the parameters that products with curvature are taken of; none where it wants none.
        products: how they are made.
        difference: length of the displacement that they are taken at, over 1 + the length of the weights.
        displacement: what the direction was multiplied by when weights were displaced last, a scalar.
        layer_blocks: measures blocks of the Gauss-Newton matrix; None where none are wanted.
    """

    probed: frozenset[str] = frozenset()
    layer_blocks: LayerBlocks | None = None
    products: Products = "difference"
    difference: float = 1e-3
    displacement: Tensor

    @abstractmethod
    def wants_estimate(self, step: int) -> Estimate | None:
        """The window of estimation that is due before the window that leads to that step; the same on all ranks."""

    @abstractmethod
    def had_estimate(self, step: int) -> None:
        """A window of estimation before that step has been, whether its gradient was finite or not."""

    def direction(self, pieces: Pieces, step: int) -> Sequence[Tensor]:
        """Pieces of the vector that products are wanted of.

        Args:
            pieces: those of this rank.
            step: that the windows come before.
        """
        return ()

    @abstractmethod
    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, pieces: Pieces
    ) -> None:
        """Take in the averaged gradient of a window of estimation; collective.

        Args:
            gradients: of this rank's pieces.
            states: what is kept of them.
            take: boolean scalar, the same on all ranks: false leaves everything as it is.
            pieces: those of this rank; their `weight` is that of its sums in sums over all ranks.
        """

    def need_estimate(self, step: int) -> None:
        """See that none was left out.

        Raises:
            RunError: the loop has left out a window of estimation.
        """
        if self.wants_estimate(step) is not None:
            raise RunError(
                f"step {step} needs an estimate of curvature first",
                where="engine.step",
                remedy="call dsso.engines.estimates.run before every window",
            )


def probe_of(seed: int, name: str, step: int) -> noise.Direction:
    """Signs at random for a parameter: which ones depends on seed, step, name and unsharded index alone."""
    return noise.Direction(seed, name, step % noise.MAX_STREAM, "rademacher")


class HessianProduct:
    """Puts H v together from what windows of estimation come to: one window, or gradients at two weights."""

    def __init__(self) -> None:
        self._first: list[Tensor] | None = None
        self._good: Tensor | None = None

    def take_in(
        self, method: EstimatingMethod, gradients: Sequence[Tensor], take: Tensor
    ) -> tuple[list[Tensor], Tensor] | None:
        """The product in pieces, and whether all of it is finite; None while half of it is missing.

        Args:
            method: whose product it is.
            gradients: of a window, in pieces.
            take: they are finite on all ranks.
        """
        if method.products == "double_backward":
            return list(gradients), take
        if self._first is None or self._good is None:
            self._first, self._good = [g.clone() for g in gradients], take
            return None
        half = 0.5 / method.displacement
        found = [(one - two) * half for one, two in zip(self._first, gradients, strict=True)]
        take = take & self._good
        self._first = self._good = None
        return found, take


class Pieces:
    """The pieces of this rank that windows of estimation are about.

    Args:
        method: the method.
        places: of every piece its buffer, its first element in that, and its length.
        buffers: the weights.
        states: of the buffers.
        kept: names of what the method keeps of every element.
        weight: of this rank in sums over all ranks; less than 1 where several hold the same pieces.
        table: the layout of all ranks.
    """

    def __init__(
        self,
        method: EstimatingMethod,
        places: Sequence[tuple[int, int, int]],
        buffers: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        kept: Sequence[str],
        weight: float,
        table: SpanTable,
    ) -> None:
        self.method = method
        self.weight = weight
        self._table, self._buffers = table, [buffer.detach() for buffer in buffers]
        self._exchanges: dict[frozenset[str], FragmentExchange] = {}
        self._places = list(places)
        self._weights = self._of(self._buffers)
        by_name = {name: self._of([state[name] for state in states]) for name in kept}
        self._states = [{name: by_name[name][n] for name in kept} for n in range(len(self._places))]

    @classmethod
    def of_spans(
        cls, method: EstimatingMethod, buffers: Sequence[Tensor], weight: float, table: SpanTable
    ) -> Pieces:
        """Those of the parameters that a method with owners takes products of; it keeps nothing of their elements.

        Args:
            method: the method.
            buffers: the weights.
            weight: of this rank in sums over all ranks.
            table: the layout of all ranks.
        """
        spans = table.ranks[collectives.rank()]
        places = [(s.buffer, s.offset, s.numel) for s in spans if s.name in method.probed and s.numel]
        return cls(method, places, buffers, [], (), weight, table)

    def _of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[buffer].view(-1).narrow(0, at, numel) for buffer, at, numel in self._places]

    def probe(self, seed: int, step: int) -> list[Tensor]:
        """Signs at random, one an element: which one depends on seed, step, parameter and unsharded index alone.

        Args:
            seed: of the method.
            step: of the run.
        """
        out = self._zeros()
        for span in self._table.ranks[collectives.rank()]:
            if span.name in self.method.probed and span.numel:
                signs = out[span.buffer].narrow(0, span.offset, span.numel)
                noise.add(signs, signs, probe_of(seed, span.name, step), span.start, 1.0)
        # What lies between the pieces is given back.
        return [signs.clone() for signs in self._of(out)]

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(flat, requires_grad=False).view(-1) for flat in self._buffers]

    def _everywhere(self, names: frozenset[str]) -> FragmentExchange:
        """Brings those parameters to all ranks, whole."""
        if names not in self._exchanges:
            everyone = range(collectives.world_size())
            self._exchanges[names] = self.exchange(
                {name: everyone for name in self._table.sizes if name in names}
            )
        return self._exchanges[names]

    def exchange(self, workers: Mapping[str, Sequence[int]]) -> FragmentExchange:
        """What brings parameters, whole, to those who work on them."""
        return FragmentExchange(self._table, workers, collectives.rank())

    def _flat(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """A vector in pieces as buffers, zero elsewhere."""
        out = self._zeros()
        for view, piece in zip(self._of(out), vector, strict=True):
            view.copy_(piece)
        return out

    def at_workers(self, vector: Sequence[Tensor], exchange: FragmentExchange) -> dict[str, Tensor]:
        """Whole flat values of a vector in pieces, of the parameters that this rank works on; collective.

        Args:
            vector: in pieces.
            exchange: brings parameters to those who work on them.
        """
        found = exchange.gather(self._flat(vector))
        # A process by itself gets views of what it sent from.
        return {name: one.clone() for name, one in found.items()} if len(self._table.ranks) == 1 else found

    def whole_direction(self, step: int) -> dict[str, Tensor]:
        """The method's direction, flat, by parameter, whole on every rank; collective.

        Args:
            step: that the windows come before.
        """
        out = self._flat(self.method.direction(self, step))
        return self._everywhere(self.method.probed).gather(out)

    def mapped(
        self,
        vector: Sequence[Tensor],
        names: frozenset[str],
        act: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        rest: Tensor,
    ) -> list[Tensor]:
        """Pieces of what becomes of a vector, some of whose parts are mapped whole; collective.

        Args:
            vector: in pieces.
            names: parameters that are mapped whole, the same on all ranks.
            act: makes new flat values of their flat values.
            rest: scalar that all others are multiplied by.
        """
        out, exchange = self._flat(vector), self._everywhere(names)
        mapped = act(exchange.gather(out))
        torch._foreach_mul_(out, rest)
        exchange.scatter(mapped, out)
        return self._of(out)

    @contextmanager
    def displaced(self, sign: float, step: int) -> Iterator[None]:
        """Within it the weights are `sign` times the displacement further along the method's direction; collective.

        Afterwards they are bit by bit what they were.

        Args:
            sign: to which side.
            step: that the windows come before.
        """
        direction = self.method.direction(self, step)
        squares = self._buffers[0].new_zeros(2)
        for w, v in zip(self._weights, direction, strict=True):
            squares = squares + torch.stack([torch.dot(w, w), torch.dot(v, v)])
        lengths = collectives.all_sum(squares * self.weight).sqrt()
        tiny = torch.finfo(lengths.dtype).tiny
        factor = self.method.difference * (1 + lengths[0]) / lengths[1].clamp_min(tiny)
        self.method.displacement = factor
        kept = [w.clone() for w in self._weights]
        for w, v in zip(self._weights, direction, strict=True):
            w.addcmul_(v, factor, value=sign)
        try:
            yield
        finally:
            for w, before in zip(self._weights, kept, strict=True):
                w.copy_(before)

    def estimate(self, gradients: Sequence[Tensor]) -> None:
        """End a window of estimation; collective.

        Args:
            gradients: flat, of the buffers.
        """
        views = self._of(gradients)
        finite = torch.stack([torch.isfinite(view.square().sum()) for view in views]) if views else None
        bad = gradients[0].new_zeros(1) if finite is None else (~finite.all()).to(torch.float32).reshape(1)
        take = collectives.all_sum(bad)[0] == 0
        self.method.estimate(views, self._states, take, self)
