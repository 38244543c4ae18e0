"""HiZOO: simultaneous perturbation shaped by an estimate of the Hessian's diagonal.

With H the estimate (Sigma = 1/H in the paper, elementwise), z normal, and three forward passes,

    up, down = L(w + eps z / sqrt(H)), L(w - eps z / sqrt(H))            at = L(w)
    g = (up - down) / (2 eps)          c = (up + down - 2 at) / (2 eps^2)
    H <- (1 - a) H + a | mean over n directions of c H z^2 |             (a: `smooth`)
    w <- w - lr (1/n) sum over n directions of g z / sqrt(H)             (with the new H)

That is algorithm 1 of the paper; n directions share L(w), 1 + 2 n passes. The estimate is not that of the diagonal
alone: with d the Hessian's diagonal, E[c z_i^2] = (1/2) sum_j d_j / H_j + d_i / H_i, and the paper leaves out what
would take the first term away. All elements of H grow or shrink together by it, and H rests at (1 + N/2) d for N
elements; their ratios get there at a rate of a / (1 + N/2) a step, that is hardly ever in a large model.

Deviations from the published code: three passes a direction (its script makes four, and leaves H at 1 unless told
otherwise); H is kept in fp32 whatever the weights are (in 16 bits a product with 1 - 1e-6 changes nothing) and within
`bounds`, and a (|c z^2| - 1) H is added to it, which fp32 resolves better than the product; of several directions the
mean is taken before the absolute value; weight decay is decoupled and applies to matrices only. Four bytes a trained
element, sharded as the weights are. Signs (`noise: rademacher`) are refused: their squares are all one, and H would
stay the same for all elements; so is `sides: 1`, which shows no curvature.

Source: Zhao, Dang, Ye, Dai, Qian, Tsang 2024, "Second-order fine-tuning without pain for LLMs: a Hessian informed
zeroth-order optimizer".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsso.config import problem
from dsso.optim._probes import Piece, Probe
from dsso.optim._spsa import LARGEST, ShapedMethod, SPSAConfig, parts
from dsso.parallel import noise
from dsso.schedule import ScalarSchedule, bounded, value


class Config(SPSAConfig):
    """Parameters of HiZOO (`optimizer.params`)."""

    smooth: Annotated[ScalarSchedule, bounded(gt=0, le=1)] = 1e-6
    """Share of a step's estimate in H. A schedule. Below 1e-7 only growth shows in fp32, decay is rounded away."""
    bounds: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (1e-3, 1e6)
    """Smallest and largest element of H, which starts at 1."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.sides != 2:
            raise problem(
                "a curvature needs losses on both sides and at the weights",
                got=f"sides {self.sides}",
                allowed="2",
                remedy="set sides to 2; a step takes 1 + 2 n passes",
            )
        if self.noise == "rademacher":
            raise problem(
                "squares of signs tell nothing of single elements, so H would be one number",
                got="noise 'rademacher'",
                allowed="'gaussian'",
                remedy="set noise to 'gaussian'",
            )
        if not self.bounds[0] <= 1.0 <= self.bounds[1]:
            raise problem(
                "H starts at 1, which has to be within the bounds",
                got=list(self.bounds),
                allowed="a number up to 1, and one from 1 on",
            )
        return self


class Method(ShapedMethod):
    """HiZOO.

    Args:
        config: its parameters.
    """

    states: ClassVar[Mapping[str, float]] = {"curvature": 1.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._smooth, self._bounds = config.smooth, config.bounds

    def probes(self, step: int) -> list[Probe]:
        """The weights, and both sides of every direction."""
        return [Probe(0, 0.0), *super().probes(step)]

    def shaped(self, name: str, start: int, out: Tensor, stream: int, step: int) -> None:
        """Set z / sqrt(H)."""
        noise.add(out.zero_(), out, self.direction(name, stream, step), start, 1.0)
        out.div_(self.held("curvature", name, start, out.numel()).sqrt())

    def measure(self, losses: Tensor, step: int) -> Tensor:
        """Slope and curvature along every direction, [directions, 2]."""
        up, down, eps = losses[1::2], losses[2::2], self.config.eps
        slopes = self.bounded((up - down) / (2 * eps))
        # Finite ones only as far as fp32 can take them; the bounds of H do the rest.
        bent = (up + down - 2 * losses[0]) / (2 * eps * eps)
        return torch.stack([slopes, bent.where(~bent.isfinite(), bent.clamp(-LARGEST, LARGEST))], 1)

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """Take the curvature into H, and a step."""
        slopes, bent = measures[:, 0].tolist(), measures[:, 1].tolist()
        share, (least, most) = value(self._smooth, step), self._bounds
        for piece in pieces:
            self.shrink(piece, step, lr)
            for at, z in parts(piece.base):
                start = piece.start + at
                seen, move = torch.zeros_like(z), torch.zeros_like(z)
                for stream, (slope, curve) in enumerate(zip(slopes, bent, strict=True)):
                    noise.add(z.zero_(), z, self.direction(piece.name, stream, step), start, 1.0)
                    move.add_(z * (slope / len(slopes)))
                    seen.add_(z.square_().mul_(curve / len(slopes)))
                held = self.held("curvature", piece.name, start, z.numel())
                held.add_(seen.abs_().sub_(1.0).mul_(share).mul_(held)).clamp_(least, most)
                # A step of no length leaves every bit, also the sign of a zero.
                if lr:
                    self.move(piece, at, move.div_(torch.sqrt(held, out=z)).mul_(-lr), step)
