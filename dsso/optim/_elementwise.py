"""Methods whose update of an element depends on that element alone: they run on shards as they lie.

Nothing is sent to owners. What such a method keeps lies beside the weights in the optimizer's state, piece by piece,
so that engines, plans and checkpoints treat it as they treat moments. Its curvature comes from windows of their own
(`engine.estimating`), whose averaged gradient is handed to the method instead of being stepped along.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsso.errors import RunError
from dsso.optim._gradient_config import GradientConfig
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives
from dsso.schedule import Interval


class ElementwiseConfig(GradientConfig):
    """Parameters of a method that runs on shards as they lie."""

    kept: ClassVar[tuple[str, ...]]
    """Names of what it keeps of every element."""
    estimate_interval: Interval = Interval(((0, 10),))
    """Steps between two estimates of curvature, each a window of its own; null in a segment: never again."""


State = Mapping[str, Tensor]
"""What a method keeps of a piece, by name."""


class ElementwiseMethod(GradientMethod):
    """A method without owners.

    Attributes:
        taken: names of the parameters that it updates; their rules name what is kept.
        interval: of the estimates.
        device: where figures are made.
    """

    taken: frozenset[str]
    interval: Interval
    device: torch.device
    _had: int = -1

    def wants_estimate(self, step: int) -> bool:
        """Whether a window of estimation is due before the window that leads to that step; the same on all ranks."""
        start, every = self.interval.segment(step)
        return every is not None and (step - start) % every == 0 and self._had != step

    def had_estimate(self, step: int) -> None:
        """The window of estimation before that step has been, whether its gradient was finite or not."""
        self._had = step

    def update(self, step: int, bad: Tensor | None) -> None:
        """Nothing is refreshed.

        Raises:
            RunError: when the loop has left out a window of estimation.
        """
        if self.wants_estimate(step):
            raise RunError(
                f"step {step} needs an estimate of curvature first",
                where="engine.step",
                remedy="where engine.wants_estimate(), run a window on sampled labels within engine.estimating()",
            )

    @abstractmethod
    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, weight: float
    ) -> None:
        """Take in the averaged gradient of a window of estimation; collective.

        Args:
            gradients: of this rank's pieces.
            states: what is kept of them.
            take: boolean scalar, the same on all ranks: false leaves everything as it is.
            weight: of this rank in sums over all ranks; less than 1 where several hold the same pieces.
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
        states: of the buffers.
        kept: names of what the method keeps.
        weight: of this rank in sums over all ranks.
    """

    def __init__(
        self,
        method: ElementwiseMethod,
        view: Callable[[Tensor, int], Tensor],
        places: Sequence[int],
        states: Sequence[Mapping[str, Any]],
        kept: Sequence[str],
        weight: float,
    ) -> None:
        self.method = method
        self.weight = weight
        self._view = view
        self._places = list(places)
        self._states = [
            {name: view(states[place][name], index) for name in kept}
            for index, place in enumerate(self._places)
        ]

    def _of(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [self._view(gradients[place], index) for index, place in enumerate(self._places)]

    def estimate(self, gradients: Sequence[Tensor]) -> None:
        """End a window of estimation; collective.

        Args:
            gradients: flat, of the buffers.
        """
        views = self._of(gradients)
        finite = torch.stack([torch.isfinite(view.square().sum()) for view in views]) if views else None
        bad = gradients[0].new_zeros(1) if finite is None else (~finite.all()).to(torch.float32).reshape(1)
        take = collectives.all_sum(bad)[0] == 0
        self.method.estimate(views, self._states, take, self.weight)

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
