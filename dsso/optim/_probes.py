"""The contract of methods that need only losses, and the optimizer that carries one through any engine.

A step evaluates the loss at some points near the weights, and moves the weights along directions that are made again
from a seed. Nothing that has the size of the weights is sent: ranks exchange sums and counts of losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dsso.errors import RunError
from dsso.optim._rules import Rule
from dsso.parallel import collectives
from dsso.parallel.fragments import Span, SpanTable
from dsso.phases import phased

Write = Callable[[str, int, Tensor, Tensor], None]
"""`write(name, start, base, out)`: fill `out` with what the model shall compute with in the place of `base`, the
elements from `start` on of a parameter; both are 1-D and contiguous."""


_COUNTERS = ("steps", "skipped", "consecutive_skips", "flat")
"""Attributes of `ForwardOptimizer` that a checkpoint keeps."""


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter that this rank holds and moves.

    Attributes:
        name: of the parameter.
        start: flat index of the first element in the whole parameter.
        base: the weights themselves, 1-D; fp32 where there is a master copy.
        decayed: weight decay applies.
        moved: the model uses it, so a step may move it.
    """

    name: str
    start: int
    base: Tensor
    decayed: bool
    moved: bool = True


class Weights(Protocol):
    """What an engine knows of the weights that a forward method moves."""

    pieces: Sequence[Piece]

    def showing(self, write: Write | None) -> AbstractContextManager[None]:
        """Within it the model computes with what `write` gives; None: with the weights themselves."""

    def publish(self) -> None:
        """Bring the weights that the model computes with in line with the pieces."""


@dataclass(frozen=True)
class Probe:
    """One evaluation of the loss.

    Attributes:
        stream: number of the direction.
        scale: of the perturbation; 0 evaluates at the weights themselves.
    """

    stream: int
    scale: float


class ForwardMethod(ABC):
    """Turns losses at probes into a step.

    Attributes:
        states: kinds of state that a method keeps for every element that a rank holds, in fp32, with their first value.
        shows_state: a perturbation depends on state, so a rank can perturb just the elements that it holds.
        spread: every rank evaluates the whole batch along directions of its own.
        stochastic: weights of 16 bits are moved themselves, by stochastic rounding, and have no copy in fp32.
        state: of each piece, by name of the parameter and kind, [elements of the piece].
        taken: updates before the one to come: steps that were skipped, or without any slope, are none.
    """

    states: ClassVar[Mapping[str, float]] = {}
    shows_state: ClassVar[bool] = False
    spread = stochastic = False

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Tensor]] = {}
        self.taken = 0
        self._starts: dict[str, int] = {}

    def attach(self, pieces: Sequence[Piece]) -> None:
        """Make the state of the pieces of this rank, no two of one parameter."""
        self._starts = {piece.name: piece.start for piece in pieces}
        self.state = {
            piece.name: {
                kind: torch.full((piece.base.numel(),), first, dtype=torch.float32, device=piece.base.device)
                for kind, first in self.states.items()
            }
            for piece in pieces
        }

    def adopt(self, other: ForwardMethod) -> None:
        """Go on with the state of another one, which from then on both have."""
        self.state, self._starts = other.state, other._starts

    def held(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """State of some elements that this rank holds, a view.

        Args:
            kind: of state.
            name: of the parameter.
            start: flat index in the whole parameter.
            numel: number of elements.

        Shapes:
            result: [numel].
        """
        return self.state[name][kind].narrow(0, start - self._starts[name], numel)

    @abstractmethod
    def probes(self, step: int) -> list[Probe]:
        """Where the loss is evaluated in a step, in order; the same on every rank."""

    @abstractmethod
    def write(self, probe: Probe, step: int) -> Write | None:
        """How the weights are perturbed for a probe; None: not at all."""

    @abstractmethod
    def measure(self, losses: Tensor, step: int) -> Tensor:
        """What a step needs to know of each direction.

        Args:
            losses: [probes], in fp64.
            step: number of the step.

        Shapes:
            result: [directions, figures]; the first figure is the estimate of the directional derivative.
        """

    @abstractmethod
    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """Move the weights, in place.

        Args:
            pieces: of this rank.
            measures: finite, from `measure`, on the host, [directions, figures].
            step: number of the step.
            lr: learning rate of the step.
        """


def ratio(sums: Tensor) -> Tensor:
    """Mean losses: [probes, 2], sums of losses and numbers of loss terms, to [probes]."""
    return sums[:, 0] / sums[:, 1]


class ForwardOptimizer(torch.optim.Optimizer):
    """Carries a forward method; its face to engines, checkpoints and loops is that of `PartitionOptimizer`.

    Args:
        parameters: those that are trained.
        lr: learning rate; schedulers change it in `param_groups`.
        method: what is carried.
        name: of the method, as a recipe's `type` in lower case.

    Attributes:
        steps: steps taken, skipped ones included.
        skipped: of them, how many left the weights alone.
        consecutive_skips: skipped steps in a row.
        record: what is needed to take the last step again: its number (from 1), learning rate and measures; JSON.
        flat: steps in which every slope was zero, so that the weights were left alone as well.
    """

    method: None = None
    """There is none that takes gradients."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, method: ForwardMethod, name: str) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.forward_method = method
        self.method_name = name
        self.steps = self.skipped = self.consecutive_skips = self.flat = 0
        self.rules: dict[str, Rule] = {}
        self.table = SpanTable({}, ())
        self._weights: Weights | None = None
        self._figures: dict[str, float] = {}
        self.record: dict[str, Any] = {}

    def attach(self, weights: Weights, sizes: Mapping[str, int]) -> None:
        """Learn what is held; collective.

        Args:
            weights: of the engine.
            sizes: elements of every trained parameter, in model order.

        Raises:
            ValueError: when a parameter is not held completely.
        """
        spans = [Span(p.name, p.start, p.base.numel(), i, 0) for i, p in enumerate(weights.pieces)]
        self.table = SpanTable.collect(sizes, spans)
        self.table.check()
        self.rules = dict.fromkeys(sizes, Rule("sgd"))
        self._weights = weights
        self.forward_method.attach(weights.pieces)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One step; collective.

        Args:
            closure: evaluates this rank's share of the batch: sum of the losses and number of loss terms, [2]; or,
                with `value`, any sums, [m].
            value: what is lowered, [probes], as a pure function of the sums of all ranks, [probes, m] in fp64; None:
                the first sum over the second.

        Returns:
            What is lowered, its mean over the probes, a scalar tensor.

        Raises:
            RuntimeError: without a closure, or before `attach`.
            RunError: `value` returns something of another shape.
        """
        if closure is None or self._weights is None:
            raise RuntimeError("this optimizer needs a closure that evaluates the loss, and weights attached")
        method, step = self.forward_method, self.steps
        try:
            sums, forwards = self._evaluate(closure, self._weights)
            losses = (value or ratio)(sums)
            if losses.shape != sums.shape[:1]:
                raise RunError(
                    "value(sums) must return one number for each evaluation",
                    where="engine.step",
                    got=f"shape {tuple(losses.shape)}",
                    allowed=f"a tensor of shape ({len(sums)},), from sums of shape {tuple(sums.shape)}",
                )
            # What is done next depends on these few numbers, which the host has to know for its seed log anyway.
            measures = method.measure(losses.cpu(), step)
            good = all(bool(torch.isfinite(one).all()) for one in (sums, losses, measures))
            self._move(measures if good else None, float(self.param_groups[0]["lr"]))
        finally:
            self._weights.publish()
        self._figures = {"slope": float(measures[:, 0].abs().mean()), "forwards": float(forwards)}
        return losses.mean()

    @phased("evaluate")
    def _evaluate(self, closure: Callable[[], Tensor], weights: Weights) -> tuple[Tensor, int]:
        """Sums of all ranks at every probe, [probes, m], and how many of them this rank has evaluated; collective."""
        method, step = self.forward_method, self.steps
        probes = method.probes(step)
        mine = dict.fromkeys(range(len(probes)), 1.0)
        if method.spread and collectives.is_distributed():
            me, world = collectives.rank(), collectives.world_size()
            count = len({probe.stream for probe in probes if probe.scale})
            if count % world:
                raise RunError(
                    f"{count} direction(s) cannot be spread evenly over {world} ranks",
                    where="optimizer.params.directions",
                    got=count,
                    allowed=f"a multiple of {world}",
                )
            # The weights themselves are evaluated by all, so that all make as many passes; one of them is counted.
            mine = {
                i: 1.0 if probe.scale or me == 0 else 0.0
                for i, probe in enumerate(probes)
                if not probe.scale or probe.stream * world // count == me
            }
        found = {}
        for index, counted in mine.items():
            with weights.showing(method.write(probes[index], step)):
                found[index] = closure().to(torch.float64) * counted
        nothing = torch.zeros_like(next(iter(found.values())))
        return collectives.all_sum(torch.stack([found.get(i, nothing) for i in range(len(probes))])), len(
            found
        )

    @phased("move")
    def _move(self, measures: Tensor | None, lr: float) -> None:
        """Move the weights and count the step: a skipped one without measures, a flat one without any slope."""
        assert self._weights is not None
        good = measures is not None
        # On a plateau a step would be weight decay and momentum alone.
        flat = measures is not None and not bool(measures[:, 0].any())
        if measures is not None and not flat:
            moved = [piece for piece in self._weights.pieces if piece.moved]
            self.forward_method.taken = self.steps - self.skipped - self.flat
            self.forward_method.update(moved, measures, self.steps, lr)
        self.skipped += not good
        self.flat += flat
        self.consecutive_skips = 0 if good else self.consecutive_skips + 1
        self.steps += 1
        told = [] if measures is None else measures.tolist()
        self.record = {"step": self.steps, "lr": lr, "measures": told}
        if not good:
            self.record["skipped"] = True

    @torch.no_grad()
    def replay(self, record: Mapping[str, Any]) -> None:
        """Take a step again without evaluating anything; the weights that the model computes with stay behind.

        Args:
            record: what `record` was after that step.

        Raises:
            RunError: it is not that of the next step, or not one of this method.
        """
        if record["step"] != self.steps + 1:
            raise RunError(
                f"step {self.steps + 1} is next, and the record is of step {record['step']}", where="seed log"
            )
        told = None
        if not record.get("skipped"):
            method = self.forward_method
            wanted = method.measure(
                torch.zeros(len(method.probes(self.steps)), dtype=torch.float64), self.steps
            )
            try:
                told = torch.tensor(record["measures"], dtype=torch.float64)
            except (TypeError, ValueError):
                told = torch.empty(0)
            if told.shape != wanted.shape:
                raise RunError(
                    f"the record of step {record['step']} does not fit the method",
                    where="seed log",
                    got=str(record["measures"])[:80],
                    allowed=f"numbers of shape {tuple(wanted.shape)}",
                )
        self._move(told, float(record["lr"]))

    # -- reports and state --------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Figures of the last step."""
        skips = {"skipped_steps": float(self.skipped), "consecutive_skips": float(self.consecutive_skips)}
        return {**self._figures, **skips, "flat_steps": float(self.flat)} if self._figures else {}

    def state_bytes(self) -> int:
        """Bytes of state beside the model's own weights, on this rank: master copies, and what the method keeps."""
        assert self._weights is not None
        own = {p.data_ptr() for group in self.param_groups for p in group["params"]}
        bases = [p.base for p in self._weights.pieces if p.base.data_ptr() not in own]
        kept = [tensor for kinds in self.forward_method.state.values() for tensor in kinds.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*bases, *kept))

    def views(self, spans: Iterable[Span]) -> Iterator[tuple[str, Span, Tensor]]:
        """Where weights lie: `(kind, span, 1-D view)`.

        Args:
            spans: of this rank, or parts of them.
        """
        assert self._weights is not None
        for span in spans:
            yield "weight", span, self._weights.pieces[span.buffer].base.narrow(0, span.offset, span.numel)
            for kind in self.forward_method.states:
                yield kind, span, self.forward_method.held(kind, span.name, span.start, span.numel)

    def extra_state(self) -> dict[str, Any]:
        """Host-side state, the same on all ranks."""
        return {name: getattr(self, name) for name in _COUNTERS} | {"method": None}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `extra_state` returned."""
        for name in _COUNTERS:
            setattr(self, name, int(state[name]))
