"""What a plan says: bytes of every rank, bytes on the wire, operations, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankBytes:
    """Memory of one rank in bytes.

    Attributes:
        weights: of the model, frozen ones and buffers included.
        masters: fp32 copies of trained weights, where the optimizer steps copies.
        moments: of the optimizer.
        factors: Kronecker factors with their factorizations.
        gradients: as the optimizer finds them when it steps.
        gradients_in_pass: most at the end of a micro-batch's backward pass.
        buckets: what the engine has only while a pass runs, at most: also perturbed copies.
        lasting: those of them that stay during the step.
        sums: of a window that measures all factors, most at one time.
        statistics: these sums and their buffers.
        statistics_later: of the largest window once measurements are spread.
        refresh: factorizations being made or waiting to be taken over, when all are due in one step.
        refresh_later: once they are spread.
        exchange: buffers for whole gradients and updates, at most.
        vectors: of a method that solves with products of curvature, while windows of estimation run.
        answers: products with curvature that owners of blocks keep until they refresh.
        in_pass: everything at the end of the backward pass.
        in_step: everything in the optimizer's step.
        host: what lies in the host's memory instead of the device's, none of it counted above.
    """

    weights: int
    masters: int
    moments: int
    factors: int
    gradients: int
    gradients_in_pass: int
    buckets: int
    lasting: int
    sums: int
    statistics: int
    statistics_later: int
    refresh: int
    refresh_later: int
    exchange: int
    in_pass: int
    in_step: int
    vectors: int = 0
    answers: int = 0
    host: int = 0

    @property
    def optimizer(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def peak(self) -> int:
        """Most at one time, activations not counted."""
        return max(self.in_pass, self.in_step)


@dataclass(frozen=True)
class Window:
    """Statistics of one step and what is done with them.

    Attributes:
        sums: most bytes of sums at one time, on every rank.
        buffers: bytes on their way: buckets, what has arrived, bases of low-rank forms; of one rank.
        arrived: bytes of the sums of all ranks where they are averaged; of one rank.
        refresh: bytes of factorizations being made or waiting to be taken over; of one rank.
    """

    sums: int = 0
    buffers: int = 0
    arrived: int = 0
    refresh: int = 0

    @property
    def peak(self) -> int:
        """Most of it at one time: one comes after the other."""
        return max(self.sums + self.buffers, self.arrived, self.refresh)


@dataclass(frozen=True)
class Wire:
    """Bytes on the wire.

    Attributes:
        gradients: a rank hands to the engine's reductions, per step.
        weights: a rank hands to the engine's gathering, per step.
        exchange: the busiest rank sends to others, per step: gradients to who preconditions them, updates back.
        statistics: a rank hands to the reductions to owners, per measurement of all factors.
        bases: broadcast, per measurement of all factors: what low-rank forms are measured against.
        factorizations: the busiest rank sends to other appliers, per factorization of all factors.
        estimates: for estimates of curvature: windows, displaced weights, vectors; per step on average.
        per_step: all of it, averaged over the schedule's last intervals.
        losses: handed to the reductions per step, by methods from forward passes; a few numbers.
    """

    gradients: int = 0
    weights: int = 0
    exchange: int = 0
    statistics: int = 0
    bases: int = 0
    factorizations: int = 0
    estimates: int = 0
    per_step: int = 0
    losses: int = 0


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the busiest rank; products with weights only, attention scores not counted.

    Attributes:
        training: forward and backward passes of a step, at full length; forward passes alone where there are no others.
        apply: preconditioning, per step.
        measure: one measurement of all factors.
        refresh: one factorization of all factors.
        estimates: passes for estimates of curvature, per step on average.
        share: all that the method adds to `training`, averaged over the schedule's last intervals.
        passes: forward passes a rank makes of every micro-batch in a step, where there are no others; else 0.
    """

    training: float = 0.0
    apply: float = 0.0
    measure: float = 0.0
    refresh: float = 0.0
    estimates: float = 0.0
    share: float = 0.0
    passes: int = 0


@dataclass(frozen=True)
class StrategyRow:
    """One strategy of placement: who applies a layer's factors."""

    name: str
    factors: int
    peak: int
    wire_per_step: int
    fits: bool | None


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe that was planned.

    Attributes:
        change: in words.
        overrides: for `--set`.
        world_size: number of ranks.
        peak: most bytes of a rank.
        fits: into the memory asked for.
    """

    change: str
    overrides: tuple[str, ...]
    world_size: int
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        engine: `single`, `ddp`, `fsdp2`, or `zero-0` to `zero-3`.
        world_size: number of ranks.
        dtype: of the weights in the passes.
        optimizer: `optimizer.type`.
        strategy: of the placement; empty for a baseline.
        parameters, trained: elements.
        factors: number of Kronecker factors, or of blocks.
        parts: what they are called.
        largest_unit: bytes of the layers that cannot be placed apart, at most.
        shared: layers that use the input factor of another layer.
        ranks: memory of every rank.
        sent_in_pass: statistics leave while the backward pass runs, so that few sums are there at one time.
        all_until: first step from which on a step measures a part of the factors; None: never.
        wire: bytes on the wire.
        operations: of the busiest rank.
        gpu_bytes: memory asked for, None where none was.
        strategies: what each strategy needs.
        remedies: what was tried where it does not fit, up to the first that does.
        rows: `parameter, shape, method, owner, reason` of every trained parameter.
        notes: what the user should know.
    """

    engine: str
    world_size: int
    dtype: str
    optimizer: str
    strategy: str
    parameters: int
    trained: int
    factors: int
    largest_unit: int
    shared: int
    ranks: tuple[RankBytes, ...]
    sent_in_pass: bool
    all_until: int | None
    wire: Wire
    operations: Operations
    gpu_bytes: int | None = None
    strategies: tuple[StrategyRow, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    parts: str = "Kronecker factors"

    @property
    def worst(self) -> RankBytes:
        """The rank with the largest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool | None:
        """Whether every rank's peak is within the memory asked for; None where none was."""
        return None if self.gpu_bytes is None else self.worst.peak <= self.gpu_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, with what follows from it."""
        out = dataclasses.asdict(self)
        out["peak"], out["fits"] = self.worst.peak, self.fits
        return out
