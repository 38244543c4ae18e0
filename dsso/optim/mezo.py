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

from torch import Tensor

from dsso.optim._probes import Piece
from dsso.optim._spsa import SPSAConfig, SPSAMethod
from dsso.parallel import noise


class Config(SPSAConfig):
    """Parameters of MeZO (`optimizer.params`)."""


class Method(SPSAMethod):
    """MeZO.

    Args:
        config: its parameters.
    """

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """W <- (1 - lr wd) w - lr/n sum g z."""
        scales = (-lr * measures[:, 0] / len(measures)).tolist()
        for piece in pieces:
            self.shrink(piece, lr)
            for stream, scale in enumerate(scales):
                # A step of no length leaves every bit, also the sign of a zero.
                if scale:
                    z = self.direction(piece.name, stream, step)
                    noise.add(piece.base, piece.base, z, piece.start, scale)
