"""Methods whose update of an element depends on that element alone: they run on shards as they lie.

Nothing is sent to owners. What such a method keeps lies beside the weights in the optimizer's state, piece by piece,
so that engines, plans and checkpoints treat it as they treat moments. Its curvature comes from windows of estimation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dsso.errors import RecipeError
from dsso.optim._estimating import EstimatingMethod, Pieces, State
from dsso.optim._gradient_config import GradientConfig
from dsso.optim._rules import Rule
from dsso.optim._tensors import EXCLUDED, excluded


class ElementwiseConfig(GradientConfig):
    """Parameters of a method that runs on shards as they lie."""

    kept: ClassVar[tuple[str, ...]]
    """Names of what it keeps of every element."""

    def whole_bytes(self, model: nn.Module, taken: Collection[str]) -> int:
        """Of matrices that every rank keeps whole through windows of estimation; there is a second copy in the step.

        Args:
            model: the unwrapped model, which may be on the meta device.
            taken: names of the parameters that the method takes.
        """
        return 0


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


class ElementwiseMethod(EstimatingMethod):
    """A method without owners.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where figures are made.
        kind: its name, for messages.

    Attributes:
        taken: names of the parameters that it updates, and may take products of; their rules name what is kept.
        device: where figures are made.
    """

    taken: frozenset[str]

    def __init__(self, config: ElementwiseConfig, model: nn.Module, device: torch.device, kind: str) -> None:
        self.device = device
        self.workers: dict[str, tuple[int, ...]] = {}
        self.owners: dict[str, int] = {}
        self._shared, self._chosen = config, choose(model, config.exclude, kind)
        self.rest, self.taken = self._chosen.rest, frozenset(self._chosen.taken)
        self.probed = self.taken
        self.displacement = torch.zeros((), device=device)

    def rules(self) -> dict[str, Rule]:
        """SGD for what is taken, with what is kept beside; the base method for what is excluded."""
        chosen = self._chosen
        return self._shared.rules(chosen.taken, chosen.rest, chosen.matrices, self._shared.kept)

    def update(self, step: int, bad: Tensor | None) -> None:
        """Nothing is refreshed.

        Raises:
            RunError: when the loop has left out a window of estimation.
        """
        self.need_estimate(step)

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


class ElementwisePieces(Pieces):
    """The pieces of this rank that an elementwise method works on; arguments as of `Pieces`."""

    method: ElementwiseMethod

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
