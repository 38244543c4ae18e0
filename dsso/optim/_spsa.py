"""Simultaneous perturbation: what the methods share that estimate slopes along directions made from a seed.

With z a random direction, the slope of the loss L along it is estimated from two forward passes,

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)        (SPSA, Spall 1992)

and the gradient by the mean of g z over n directions (n-SPSA). `sides: 1` takes L(w) in the place of the second loss,
once for all directions: n + 1 passes instead of 2 n.

Methods that keep state work on it in parts, and multiply and add in two operations: a fused one rounds once in vector
registers and twice in what is left over at the end of a part, and a step would depend on how the weights are cut.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dsso.config import StrictModel
from dsso.optim._probes import ForwardMethod, Piece, Probe, Write
from dsso.parallel import noise, rounding
from dsso.parallel.noise import MAX_STREAM, Direction, Kind
from dsso.schedule import ScalarSchedule, bounded, value

CHUNK = 1 << 18
"""Elements of a gradient estimate that exist at a time, a multiple of every block of noise."""

LARGEST = 1e17
"""A slope above counts as not finite: with z and squared it would leave fp32, and an infinite second moment stays."""


class SPSAConfig(StrictModel):
    """Parameters that all methods with random directions have."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate; a scheduler section of the recipe multiplies it."""
    eps: float = Field(default=1e-3, gt=0)
    """Length of a perturbation, as a multiple of z."""
    directions: Annotated[ScalarSchedule, bounded(ge=1)] = 1
    """Directions a step (n). A schedule; its values are rounded down."""
    sides: int = Field(default=2, ge=1, le=2)
    """2: losses on both sides of the weights. 1: on one side and at the weights."""
    noise: Kind = "gaussian"
    """Distribution of z."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled: matrices (not biases, not norms) shrink by lr * weight_decay a step."""
    max_slope: float | None = Field(default=None, gt=0)
    """Slopes are cut to at most this; null: never."""
    skip_slope: float | None = Field(default=1e6, gt=0)
    """A larger slope is held for an accident: all ranks leave the step out; null: only what leaves fp32 is."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the directions."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of weights in 16 bits. `nearest`: steps go into an fp32 copy, four bytes an element, which is rounded;
    `stochastic`: no copy, a step is rounded to either neighbour at random, so that small ones survive on
    average."""
    spread: bool = False
    """Every rank evaluates the whole global batch along directions of its own, instead of its share along all of them:
    the same step, with n over the number of ranks in the place of n passes; n has to be a multiple of that number."""


class MomentsConfig(SPSAConfig):
    """Parameters of methods that keep moments of the gradient estimate."""

    lr: float = Field(default=1e-5, gt=0)
    """Learning rate, about the largest step of a weight; a scheduler section of the recipe multiplies it."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """Share of the first and of the second moment that a step keeps."""
    eps_adam: float = Field(default=1e-8, ge=1e-30)
    """Added to the root of the second moment (the largest one, of ZO-AdaMM); `eps` is the length of a perturbation."""


class SPSAMethod(ForwardMethod):
    """Probes and slopes; what is done with them is the method's own.

    Args:
        config: its parameters.
    """

    def __init__(self, config: SPSAConfig) -> None:
        super().__init__()
        self.config = config
        self.spread = config.spread
        self.stochastic = config.rounding == "stochastic"

    def directions(self, step: int) -> int:
        """Number of directions of a step."""
        return int(value(self.config.directions, step))

    def direction(self, name: str, stream: int, step: int) -> Direction:
        """The z of one parameter in one step."""
        return Direction((step << 32) | self.config.seed, name, stream, self.config.noise)

    def probes(self, step: int) -> list[Probe]:
        """Both sides of every direction; or the weights, and one side of every direction."""
        eps, streams = self.config.eps, range(self.directions(step))
        if self.config.sides == 2:
            return [Probe(stream, scale) for stream in streams for scale in (eps, -eps)]
        return [Probe(0, 0.0), *(Probe(stream, eps) for stream in streams)]

    def write(self, probe: Probe, step: int) -> Write | None:
        """Set w + scale z."""
        if not probe.scale:
            return None

        def perturb(name: str, start: int, base: Tensor, out: Tensor) -> None:
            noise.add(out, base, self.direction(name, probe.stream, step), start, probe.scale)

        return perturb

    def measure(self, losses: Tensor, step: int) -> Tensor:
        """Central or forward differences, [directions, 1]."""
        if self.config.sides == 2:
            found = (losses[0::2] - losses[1::2]) / (2 * self.config.eps)
        else:
            found = (losses[1:] - losses[0]) / self.config.eps
        return self.bounded(found).unsqueeze(1)

    def bounded(self, slopes: Tensor) -> Tensor:
        """Slopes cut to `max_slope`; an absurd one becomes infinite before, so that the step is skipped."""
        bound, absurd = self.config.max_slope, min(self.config.skip_slope or LARGEST, LARGEST)
        found = slopes if bound is None else slopes.clamp(-bound, bound)
        return found.masked_fill(slopes.abs() > absurd, torch.inf)

    def shrink(self, piece: Piece, step: int, lr: float) -> None:
        """Weight decay, where it applies."""
        keep = 1.0 - lr * self.config.weight_decay
        if not piece.decayed or keep == 1.0:
            return
        if not _is_16_bit(piece.base):
            piece.base.mul_(keep)
            return
        for at, part in parts(piece.base):
            base = piece.base[at : at + part.numel()]
            bits = self.direction(piece.name, MAX_STREAM - 1, step)
            rounding.round_stochastic(base, part.copy_(base).mul_(keep), bits, piece.start + at)

    def move(self, piece: Piece, at: int, change: Tensor, step: int) -> None:
        """Add to some elements of a piece, once a step.

        Args:
            piece: of this rank.
            at: first of them, in the piece.
            change: [elements] in fp32; overwritten.
            step: number of the step.
        """
        base = piece.base[at : at + change.numel()]
        if not _is_16_bit(base):
            base.add_(change)
            return
        bits = self.direction(piece.name, 0, step)
        rounding.round_stochastic(base, change.add_(base), bits, piece.start + at)

    def gradient(self, piece: Piece, slopes: Sequence[float], step: int) -> Iterator[tuple[slice, Tensor]]:
        """Estimate of the gradient of a piece, a part at a time: (1/n) sum g z.

        Args:
            piece: of this rank.
            slopes: g, one a direction.
            step: number of the step.

        Shapes:
            result: pairs of the elements of the piece that a part is of, and the part itself, [elements] in fp32, which
            is overwritten by the next.
        """
        for at, part in parts(piece.base):
            part.zero_()
            for stream, slope in enumerate(slopes):
                z = self.direction(piece.name, stream, step)
                noise.add(part, part, z, piece.start + at, slope / len(slopes))
            yield slice(at, at + part.numel()), part


class ShapedMethod(SPSAMethod):
    """Methods whose directions depend on state: only who holds the state of an element can perturb it."""

    shows_state = True

    @abstractmethod
    def shaped(self, name: str, start: int, out: Tensor, stream: int, step: int) -> None:
        """Fill `out` with a part of a direction.

        Args:
            name: of the parameter.
            start: unsharded flat index of the first element.
            out: [elements, at most `CHUNK`], fp32.
            stream: number of the direction.
            step: number of the step.
        """

    def write(self, probe: Probe, step: int) -> Write | None:
        """Set w + scale d, computed in fp32 and rounded once."""
        if not probe.scale:
            return None

        def perturb(name: str, start: int, base: Tensor, out: Tensor) -> None:
            for at, part in parts(base):
                self.shaped(name, start + at, part, probe.stream, step)
                piece = slice(at, at + part.numel())
                torch.add(base[piece], part.mul_(probe.scale), out=out[piece])

        return perturb


def parts(base: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Room for work on a tensor, a part at a time.

    Args:
        base: [elements].

    Shapes:
        result: pairs of a first element, and room for the elements from there on, [at most `CHUNK`] in fp32, the same
        room each time.
    """
    numel = base.numel()
    room = torch.empty(min(CHUNK, numel), dtype=torch.float32, device=base.device)
    for at in range(0, numel, CHUNK):
        yield at, room[: min(CHUNK, numel - at)]


def _is_16_bit(weights: Tensor) -> bool:
    return weights.element_size() == 2
