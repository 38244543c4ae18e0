"""Methods whose update of an element depends on that element alone: they run on shards as they lie.

Nothing is sent to owners. What such a method keeps lies beside the weights in the optimizer's state, piece by piece,
so that engines, plans and checkpoints treat it as they treat moments. Its curvature comes from windows of their own
(`dsso.engines.estimates`), whose averaged gradient is handed to the method instead of being stepped along.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dsso.curvature.layer_blocks import LayerBlocks
from dsso.errors import RecipeError, RunError
from dsso.optim._gradient_config import GradientConfig
from dsso.optim._rules import Rule
from dsso.optim._tensors import EXCLUDED, excluded
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives, noise
from dsso.parallel.fragments import FragmentExchange, SpanTable

Products = Literal["difference", "double_backward"]
"""How products with curvature are made, see `dsso.engines.estimates`."""


class ElementwiseConfig(GradientConfig):
    """Parameters of a method that runs on shards as they lie."""

    kept: ClassVar[tuple[str, ...]]
    """Names of what it keeps of every element."""

    @property
    def working(self) -> int:
        """Vectors in fp32 of the size of what it takes that live through windows of estimation, kept ones aside."""
        return 0

    @property
    def products_of_curvature(self) -> Products | None:
        """How products with curvature are made; None where there are none."""
        return None

    def whole_bytes(self, model: nn.Module, taken: Collection[str]) -> int:
        """Of matrices that every rank keeps whole through windows of estimation; there is a second copy in the step.

        Args:
            model: the unwrapped model, which may be on the meta device.
            taken: names of the parameters that the method takes.
        """
        return 0


Estimate = Literal["sampled", "gradient", "gradient_pair", "hessian", "ggn", "ggn_sampled", "ggn_column"]
"""What a window of estimation is to come to: the gradient at sampled labels; the gradient; gradients at the two weights
that are displaced along the method's direction; the Hessian, or the Gauss-Newton matrix, times that direction; what a
column of a root of the losses' curvature is pulled back to."""
State = Mapping[str, Tensor]
"""What a method keeps of a piece, by name."""


@dataclass(frozen=True)
class Chosen:
    """Which parameters an elementwise method takes.

    Attributes:
        taken: their names, in model order.
        rest: the others that are trained, with the reason.
        matrices: names of those, of either kind, with two or more dimensions.
        size: elements of what is taken.
    """

    taken: list[str]
    rest: dict[str, str]
    matrices: set[str]
    size: int


def choose(model: nn.Module, exclude: Sequence[str], kind: str) -> Chosen:
    """All that is trained but what the recipe excludes.

    Args:
        model: the unwrapped model.
        exclude: patterns.
        kind: type of the method, for the message.

    Raises:
        RecipeError: nothing is left, or a pattern is none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: EXCLUDED for name in trained if excluded(name, exclude)}
    taken = [name for name in trained if name not in rest]
    if not taken:
        raise RecipeError(
            f"{kind} has no parameter to work on",
            where="optimizer.params.exclude",
            got=list(exclude),
            remedy="leave out the pattern that takes in the last of them, or use AdamW",
        )
    matrices = {name for name, p in trained.items() if len(getattr(p, "ds_shape", p.shape)) > 1}
    size = sum(int(getattr(trained[name], "ds_numel", trained[name].numel())) for name in taken)
    return Chosen(taken, rest, matrices, size)


class ElementwiseMethod(GradientMethod):
    """A method without owners.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where figures are made.
        kind: its name, for messages.

    Attributes:
        taken: names of the parameters that it updates; their rules name what is kept.
        products: how products with curvature are made.
        difference: length of the displacement that products are taken at, over 1 + the length of the weights.
        displacement: what the direction was multiplied by when weights were displaced last, a scalar.
        device: where figures are made.
        layer_blocks: measures blocks of the Gauss-Newton matrix; None where none are wanted.
    """

    taken: frozenset[str]
    layer_blocks: LayerBlocks | None = None
    products: Products = "difference"
    difference: float = 1e-3

    def __init__(self, config: ElementwiseConfig, model: nn.Module, device: torch.device, kind: str) -> None:
        self.device = device
        self.workers: dict[str, tuple[int, ...]] = {}
        self.owners: dict[str, int] = {}
        self._shared, self._chosen = config, choose(model, config.exclude, kind)
        self.rest, self.taken = self._chosen.rest, frozenset(self._chosen.taken)
        self.displacement = torch.zeros((), device=device)

    def rules(self) -> dict[str, Rule]:
        """SGD for what is taken, with what is kept beside; the base method for what is excluded."""
        chosen = self._chosen
        return self._shared.rules(chosen.taken, chosen.rest, chosen.matrices, self._shared.kept)

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

    def update(self, step: int, bad: Tensor | None) -> None:
        """Nothing is refreshed.

        Raises:
            RunError: when the loop has left out a window of estimation.
        """
        if self.wants_estimate(step) is not None:
            raise RunError(
                f"step {step} needs an estimate of curvature first",
                where="engine.step",
                remedy="call dsso.engines.estimates.run before every window",
            )

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

    @abstractmethod
    def act(self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor) -> list[Tensor]:
        """Updates of this rank's pieces, before clipping and the learning rate; zeros where `take` is false."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Figures of the last `act` on this rank's pieces that are summed over ranks, a vector."""

    @abstractmethod
    def note(self, counts: Tensor) -> None:
        """Learn the sums of the `counts`."""

    # -- what there is not ----------------------------------------------------------------------------------------

    def sampled_pass(self) -> AbstractContextManager[None]:
        """There is none."""
        return nullcontext()

    def wants_sampled_pass(self) -> bool:
        """Never."""
        return False

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """No parameter has an owner."""
        return {}, torch.zeros(3, device=self.device)

    def state_bytes(self) -> int:
        """Nothing beside the optimizer's state."""
        return 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Nothing beside the optimizer's state."""
        return {}

    def wants(self, name: str) -> bool:
        """Nothing."""
        return False

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """No hooks."""


class Pieces:
    """The pieces of this rank that an elementwise method works on.

    Args:
        method: the method.
        view: of a flat tensor of a buffer, its part that is the n-th piece.
        places: buffer of every piece.
        buffers: the weights.
        states: of the buffers.
        kept: names of what the method keeps.
        weight: of this rank in sums over all ranks; less than 1 where several hold the same pieces.
        table: the layout of all ranks.
    """

    def __init__(
        self,
        method: ElementwiseMethod,
        view: Callable[[Tensor, int], Tensor],
        places: Sequence[int],
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
        self._view = view
        self._places = list(places)
        self._weights = self._of(self._buffers)
        self._states = [
            {name: view(states[place][name], index) for name in kept}
            for index, place in enumerate(self._places)
        ]

    def _of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._view(tensors[place], index) for index, place in enumerate(self._places)]

    def probe(self, seed: int, step: int) -> list[Tensor]:
        """Signs at random, one an element: which one depends on seed, step, parameter and unsharded index alone.

        Args:
            seed: of the method.
            step: of the run.
        """
        out = self._zeros()
        for span in self._table.ranks[collectives.rank()]:
            if span.name in self.method.taken and span.numel:
                signs = out[span.buffer].narrow(0, span.offset, span.numel)
                direction = noise.Direction(seed, span.name, step % noise.MAX_STREAM, "rademacher")
                noise.add(signs, signs, direction, span.start, 1.0)
        return self._of(out)

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(flat, requires_grad=False).view(-1) for flat in self._buffers]

    def _everywhere(self, names: frozenset[str]) -> FragmentExchange:
        """Brings those parameters to all ranks, whole."""
        if names not in self._exchanges:
            everyone = range(collectives.world_size())
            workers = {name: everyone for name in self._table.sizes if name in names}
            self._exchanges[names] = FragmentExchange(self._table, workers, collectives.rank())
        return self._exchanges[names]

    def whole_direction(self, step: int) -> dict[str, Tensor]:
        """The method's direction, flat, by parameter, whole on every rank; collective.

        Args:
            step: that the windows come before.
        """
        out = self._zeros()
        for view, piece in zip(self._of(out), self.method.direction(self, step), strict=True):
            view.copy_(piece)
        return self._everywhere(self.method.taken).gather(out)

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
        out = self._zeros()
        for view, piece in zip(self._of(out), vector, strict=True):
            view.copy_(piece)
        exchange = self._everywhere(names)
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

    def act(self, gradients: Sequence[Tensor], take: Tensor, warmup: float | None) -> Tensor:
        """Write the updates into the gradients; this rank's part of ||u||^2, <u, g> and ||g||^2, [3].

        Args:
            gradients: flat, of the buffers.
            take: the step is finite on all ranks.
            warmup: the updates are so many times the gradients instead; None: the method's.
        """
        views = self._of(gradients)
        sums = gradients[0].new_zeros(3)
        updates = self.method.act(views, self._states, take)
        for view, update in zip(views, updates, strict=True):
            given = update if warmup is None else view * warmup
            sums = sums + torch.stack(
                [torch.dot(given, given), torch.dot(given, view), torch.dot(view, view)]
            )
            view.copy_(given)
        return sums * self.weight

    def counts(self) -> Tensor:
        """The method's figures, to be summed over ranks."""
        return self.method.counts() * self.weight
