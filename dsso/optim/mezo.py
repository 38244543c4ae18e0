"""MeZO: simultaneous perturbation with directions that are made again from a seed, in the memory of inference.

With z a random direction, the slope of the loss L along it is estimated from two forward passes,

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)        (SPSA, Spall 1992; Malladi et al. 2023, definition 1)
    w <- w - lr (1/n) sum over n directions of g z     (n-SPSA and ZO-SGD, ibid., definition 2 and algorithm 2)

`sides: 1` takes L(w) in the place of the second loss, once for all directions: n + 1 passes instead of 2 n.
`normalize` divides the step by the standard deviation s of the n losses L(w + eps z) (FZOO, Dang et al. 2025):

    w <- w - (lr / s) (1/n) sum over n directions of g z

Deviations from the published code: z belongs to (seed, step, name of the parameter, index), so it does not depend on
how the weights are sharded (there: on one generator that runs through all parameters of one process); weights come
back bit by bit after a perturbation, because they are never overwritten; losses are means over the loss terms of the
global batch; weight decay applies to matrices only. `noise: rademacher` takes signs instead of normal numbers. Of FZOO
only the step is here, not its batched forward pass; where all losses are alike, a normalized step has no length.

Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023, arXiv:2305.17333.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from dsso.config import problem
from dsso.optim._probes import Piece
from dsso.optim._spsa import SPSAConfig, SPSAMethod
from dsso.parallel import noise, rounding
from dsso.schedule import minimum


class Config(SPSAConfig):
    """Parameters of MeZO (`optimizer.params`)."""

    normalize: bool = False
    """Divide the step by the standard deviation of a step's losses (FZOO); needs `sides: 1` and two directions."""

    @model_validator(mode="after")
    def _one_side_and_two_directions(self) -> Self:
        if self.normalize and (self.sides != 1 or minimum(self.directions) < 2):
            raise problem(
                "normalize takes the standard deviation of one-sided losses over several directions",
                got=f"sides {self.sides}, at least {minimum(self.directions):g} directions",
                allowed="sides 1, directions >= 2",
                remedy="set sides to 1 and directions to 8, say, or normalize to false",
            )
        return self


class Method(SPSAMethod):
    """MeZO.

    Args:
        config: its parameters.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._normalize = config.normalize

    def measure(self, losses: Tensor, step: int) -> Tensor:
        """Slopes, and what a step is divided by; [directions, 2]."""
        slopes = super().measure(losses, step)
        over = losses[1:].std().expand(len(slopes)) if self._normalize else torch.ones(len(slopes))
        return torch.stack([slopes[:, 0], over.to(slopes.dtype)], 1)

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """W <- (1 - lr wd) w - lr/n sum g z."""
        slopes, over = measures[:, 0], measures[:, 1]
        steps = torch.where(over > 0, slopes / over, torch.zeros_like(slopes))
        scales = (-lr * steps / len(measures)).tolist()
        for piece in pieces:
            self.shrink(piece, step, lr)
            for stream, scale in enumerate(scales):
                # A step of no length leaves every bit, also the sign of a zero.
                if scale:
                    z = self.direction(piece.name, stream, step)
                    add = rounding.add_stochastic if piece.base.element_size() == 2 else noise.add
                    add(piece.base, piece.base, z, piece.start, scale)
