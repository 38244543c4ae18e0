"""ZO-AdaMU: directions that remember earlier ones, with an uncertainty that is annealed.

With m the memory of directions, z' and z'' normal with mean 0 and deviation 1, and a, b1, b2 annealed (below),

    p = sqrt(a) z'        q = m + sqrt(1 - a) z''        d = b1 p + (1 - b1) q      (eq. 4, algorithm 1 lines 10, 11)
    g = (L(w + eps d) - L(w - eps d)) / (2 eps)                                     (eq. 5, lines 4 to 6)
    v = b2 p^2 + (1 - b2) q^2                                                       (eq. 6, line 12; no memory)
    w <- w - lr g d / max(sqrt(v + sigma), floor)                                   (line 13)
    m <- d  in mode "paper",   m <- sign(g) d  in mode "fixed"

and, for t = 1, 2, … and with s = min(t, t2) - t1,

    A(phi, t) = 1                                                          for t < t1
                1/2 + 1/2 cos(pi s / (t3 - phi s (t3 - t2) / (t2 - t1)))   from then on
    a, b1, b2 = A(phi_1, t), A(phi_2, t), A(phi_3, t)

`mode: paper` is what is printed. A memory of random directions without the sign holds nothing of the loss, and
d / sqrt(v) without a floor has no variance where b2 reaches 0. `mode: fixed` remembers the side that goes uphill, which
only the published code does, and has a floor.

What had to be read into the paper
: Eq. 7 has the constant T3 - T1 above the line, with which A jumps at T1. With s in its place A begins at 1, and
  T1:T2:T3 = 1:4:6 with phi = (0.1, 1, 1.5) meets the ends of figure 1 (0.47, 0.15, 0.00). The text gives the phi of a
  and of b1 the other way round, and other values after T2 (0.5, 0.9, 0.01). A cosine that has reached -1 stays there.
: N(0, sqrt a) names the deviation. Line 13 takes v below the root, eq. 6 its square: v it is.
: The perturbation begins from m(t) in one listing and from m(t-1) in the other; here perturbation and step have the
  same d, made from what the last step has left.
: The paper has one direction a step. With n, each makes its own d from the common m, which then becomes their mean.

Deviations besides: m is kept in fp32, four bytes a trained element, sharded as the weights are; weight decay is
decoupled and applies to matrices only; `noise: rademacher` draws z' and z'' as signs; `sides: 1` is allowed.

Source: Jiang, Chen, Pan, Xiang, Lin, Wu, Liu, Song 2024, "ZO-AdaMU optimizer: adapting perturbation by the momentum and
uncertainty in zeroth-order optimization".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsso.config import problem
from dsso.optim._probes import Piece
from dsso.optim._spsa import ShapedMethod, SPSAConfig, parts
from dsso.parallel import noise

_FLOOR = 0.1
Phi = Annotated[float, Field(ge=0.0)]


def anneal(phi: float, t: float, t1: float, t2: float, t3: float) -> float:
    """The paper's Anneal, a pure function of the step.

    Args:
        phi: how fast it falls.
        t: step, counted from 1.
        t1: step at which it begins to fall.
        t2: step from which on it stays.
        t3: length of the whole course.
    """
    if t < t1:
        return 1.0
    s = min(t, t2) - t1
    share = s / (t3 - phi * s * (t3 - t2) / (t2 - t1))
    return 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))


class Config(SPSAConfig):
    """Parameters of ZO-AdaMU (`optimizer.params`)."""

    t3: int = Field(ge=1)
    """Steps of the whole course (T3), as a rule `dsso.train.max_steps`: annealing is planned over them."""
    t1: int | None = Field(default=None, ge=0)
    """Step at which annealing begins (T1); null: t3 / 6. Before, a direction is as random as MeZO's."""
    t2: int | None = Field(default=None, ge=1)
    """Step at which annealing ends (T2); null: 4 t3 / 6."""
    phi: tuple[Phi, Phi, Phi] = (0.1, 1.0, 1.5)
    """How fast the uncertainty a and the weights b1 and b2 fall."""
    mode: Literal["paper", "fixed"] = "fixed"
    """`fixed`: the memory has the sign of the slope, and the denominator a floor. `paper`: neither, as printed."""
    floor: float | None = Field(default=None, ge=0)
    """Least denominator of a step, as a multiple of a direction's; null: 0.1 in mode `fixed`, none in mode `paper`."""
    sigma: float = Field(default=1e-8, ge=1e-30)
    """Added below the root."""

    @property
    def phases(self) -> tuple[float, float, float]:
        """T1, T2 and T3."""
        t1 = self.t3 / 6 if self.t1 is None else self.t1
        t2 = 4 * self.t3 / 6 if self.t2 is None else self.t2
        return t1, t2, self.t3

    @model_validator(mode="after")
    def _annealed(self) -> Self:
        t1, t2, t3 = self.phases
        if not t1 < t2 <= t3:
            raise problem(
                "the phases of annealing must follow each other",
                got=f"t1 {t1:g}, t2 {t2:g}, t3 {t3:g}",
                allowed="t1 < t2 <= t3",
            )
        if max(self.phi) * (t3 - t2) >= t3:
            raise problem(
                "annealing is not defined where its last phase is that long",
                got=f"phi {max(self.phi):g}, t2 {t2:g}, t3 {t3:g}",
                allowed="phi (t3 - t2) < t3",
                remedy="set a later t2 or a smaller phi",
            )
        if self.mode == "paper" and self.floor is not None:
            raise problem(
                "mode 'paper' has no floor",
                got=f"floor {self.floor:g}",
                remedy="set mode to 'fixed', or leave floor out",
            )
        return self


class Method(ShapedMethod):
    """ZO-AdaMU.

    Args:
        config: its parameters.
    """

    states: ClassVar[Mapping[str, float]] = {"momentum": 0.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._phi, self._phases, self._sigma = config.phi, config.phases, config.sigma
        self._signed = config.mode == "fixed"
        self._floor = config.floor if config.floor is not None else _FLOOR if self._signed else 0.0

    def annealed(self, step: int) -> tuple[float, float, float]:
        """The uncertainty a and the weights b1 and b2 of a step that is counted from 0."""
        a, b1, b2 = (anneal(phi, step + 1, *self._phases) for phi in self._phi)
        return a, b1, b2

    def _drawn(self, name: str, start: int, numel: int, stream: int, step: int) -> tuple[Tensor, Tensor]:
        """The two random parts of a direction, p around zero and q around the memory, [numel] each."""
        a, _, _ = self.annealed(step)
        held = self.held("momentum", name, start, numel)
        around_zero, around_memory = torch.zeros_like(held), held.clone()
        first, second = (self.direction(name, 2 * stream + part, step) for part in (0, 1))
        noise.add(around_zero, around_zero, first, start, math.sqrt(a))
        if a < 1.0:
            noise.add(around_memory, around_memory, second, start, math.sqrt(1.0 - a))
        return around_zero, around_memory

    def shaped(self, name: str, start: int, out: Tensor, stream: int, step: int) -> None:
        """Set d."""
        _, b1, _ = self.annealed(step)
        p, q = self._drawn(name, start, out.numel(), stream, step)
        torch.add(p.mul_(b1), q.mul_(1.0 - b1), out=out)

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """Take a step, and the directions into the memory."""
        _, b1, b2 = self.annealed(step)
        slopes = (measures[:, 0] / len(measures)).tolist()
        for piece in pieces:
            self.shrink(piece, step, lr)
            for at, below in parts(piece.base):
                start = piece.start + at
                memory, move = torch.zeros_like(below), torch.zeros_like(below)
                for stream, slope in enumerate(slopes):
                    p, q = self._drawn(piece.name, start, below.numel(), stream, step)
                    torch.add(torch.square(p).mul_(b2), torch.square(q).mul_(1.0 - b2), out=below)
                    below.add_(self._sigma).sqrt_().clamp_(min=self._floor)
                    d = p.mul_(b1).add_(q.mul_(1.0 - b1))
                    move.add_(torch.div(d, below, out=below).mul_(slope))
                    sign = -1.0 if self._signed and slope < 0 else 1.0
                    memory.add_(d.mul_(sign / len(slopes)))
                self.held("momentum", piece.name, start, below.numel()).copy_(memory)
                # A step of no length leaves every bit, also the sign of a zero.
                if lr:
                    self.move(piece, at, move.mul_(-lr), step)
