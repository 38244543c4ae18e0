"""ZO-AdaMM: moments of the gradient estimate, and the largest second moment so far below the line.

With h = (1/n) sum over n directions of g z, as MeZO steps along (`dsso.optim.mezo`),

    m <- b1 m + (1 - b1) h           v <- b2 v + (1 - b2) h^2           v' <- max(v', v)
    w <- w - lr m / (sqrt(v') + eps_adam)

That is algorithm 1 of the paper, AMSGrad without gradients: no bias correction.

Deviations from the paper: there is no constraint on w and so no projection; z is normal or of signs, where the paper
draws u from the unit sphere and takes d g u (the same mean and covariance with z = sqrt(d) u); losses are taken on both
sides by default, `sides: 1` is the paper's; b1 does not change with the step; eps_adam takes the place of a first v'
above zero; m, v and v' are kept in fp32, twelve bytes a trained element, sharded as the weights are; weight decay is
decoupled and applies to matrices only.

Source: Chen, Liu, Xu, Li, Lin, Hong, Cox 2019, "ZO-AdaMM: zeroth-order adaptive momentum method for black-box
optimization".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dsso.optim._probes import Piece
from dsso.optim._spsa import MomentsConfig, SPSAMethod


class Config(MomentsConfig):
    """Parameters of ZO-AdaMM (`optimizer.params`)."""


class Method(SPSAMethod):
    """ZO-AdaMM.

    Args:
        config: its parameters.
    """

    states: ClassVar[Mapping[str, float]] = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._betas, self._eps = config.betas, config.eps_adam

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """Take the estimate into the moments, and a step."""
        beta1, beta2 = self._betas
        slopes = measures[:, 0].tolist()
        for piece in pieces:
            self.shrink(piece, step, lr)
            for part, estimate in self.gradient(piece, slopes, step):
                at = piece.start + part.start
                first, second, most = (
                    self.held(kind, piece.name, at, estimate.numel()) for kind in self.states
                )
                first.mul_(beta1).add_(estimate * (1.0 - beta1))
                second.mul_(beta2).add_(estimate.square_().mul_(1.0 - beta2))
                torch.maximum(most, second, out=most)
                # A step of no length leaves every bit, also the sign of a zero.
                if lr:
                    below = torch.sqrt(most, out=estimate).add_(self._eps)
                    self.move(piece, part.start, torch.div(first, below, out=estimate).mul_(-lr), step)
