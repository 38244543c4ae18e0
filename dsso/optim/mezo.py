"""MeZO: simultaneous perturbation with directions that are made again from a seed, in the memory of inference.

With z a random direction, the slope of the loss L along it is estimated from two forward passes,

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)        (SPSA, Spall 1992; Malladi et al. 2023, definition 1)
    w <- w - lr (1/n) sum over n directions of g z     (n-SPSA and ZO-SGD, ibid., definition 2 and algorithm 2)

`sides: 1` takes L(w) in the place of the second loss, once for all directions: n + 1 passes instead of 2 n.

Deviations from the published code: z belongs to (seed, step, name of the parameter, index), so it does not depend on
how the weights are sharded (there: on one generator that runs through all parameters of one process); weights come
back bit by bit after a perturbation, because they are never overwritten; losses are means over the loss terms of the
global batch; weight decay applies to matrices only. `noise: rademacher` takes signs instead of normal numbers.

Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023, "Fine-tuning language models with just forward passes".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dsso.config import StrictModel
from dsso.optim._probes import ForwardMethod, Piece, Probe, Write
from dsso.parallel import noise
from dsso.parallel.noise import Direction, Kind
from dsso.schedule import ScalarSchedule, bounded, value


class Config(StrictModel):
    """Parameters of MeZO (`optimizer.params`)."""

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
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the directions."""


class Method(ForwardMethod):
    """MeZO.

    Args:
        config: its parameters.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def _directions(self, step: int) -> int:
        return int(value(self.config.directions, step))

    def direction(self, name: str, stream: int, step: int) -> Direction:
        """The z of one parameter in one step."""
        return Direction((step << 32) | self.config.seed, name, stream, self.config.noise)

    def probes(self, step: int) -> list[Probe]:
        """Both sides of every direction; or the weights, and one side of every direction."""
        eps, streams = self.config.eps, range(self._directions(step))
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

    def slopes(self, losses: Tensor, step: int) -> Tensor:
        """Central or forward differences, one a direction."""
        if self.config.sides == 2:
            found = (losses[0::2] - losses[1::2]) / (2 * self.config.eps)
        else:
            found = (losses[1:] - losses[0]) / self.config.eps
        bound = self.config.max_slope
        return found if bound is None else found.clamp(-bound, bound)

    def update(self, pieces: Sequence[Piece], slopes: Tensor, step: int, lr: float) -> None:
        """W <- (1 - lr wd) w - lr/n sum g z."""
        scales = (-lr * slopes / len(slopes)).tolist()
        keep = 1.0 - lr * self.config.weight_decay
        for piece in pieces:
            if piece.decayed and keep != 1.0:
                piece.base.mul_(keep)
            for stream, scale in enumerate(scales):
                # A step of no length leaves every bit, also the sign of a zero.
                if scale:
                    noise.add(
                        piece.base, piece.base, self.direction(piece.name, stream, step), piece.start, scale
                    )
