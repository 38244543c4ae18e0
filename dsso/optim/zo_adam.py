"""MeZO-Adam: the moments of Adam, taken from the gradient estimate of simultaneous perturbation.

With h = (1/n) sum over n directions of g z, as MeZO steps along (`dsso.optim.mezo`), and t counting updates from 1,

    m <- b1 m + (1 - b1) h           v <- b2 v + (1 - b2) h^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps_adam)

Deviations from the published description: m and v are kept in fp32, eight bytes a trained element, sharded as the
weights are; with several directions their mean is squared, not each of them; weight decay is decoupled and applies to
matrices only.

Source: Malladi et al. 2023, arXiv:2305.17333, MeZO-Adam; Kingma and Ba 2015.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dsso.optim._probes import Piece
from dsso.optim._spsa import MomentsConfig, SPSAMethod


class Config(MomentsConfig):
    """Parameters of MeZO-Adam (`optimizer.params`)."""


class Method(SPSAMethod):
    """MeZO-Adam.

    Args:
        config: its parameters.
    """

    states: ClassVar[Mapping[str, float]] = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._betas, self._eps = config.betas, config.eps_adam

    def update(self, pieces: Sequence[Piece], measures: Tensor, step: int, lr: float) -> None:
        """Take the estimate into the moments, and a step of Adam."""
        beta1, beta2 = self._betas
        length = -lr / (1.0 - beta1 ** (self.taken + 1))
        root = (1.0 - beta2 ** (self.taken + 1)) ** 0.5
        slopes = measures[:, 0].tolist()
        for piece in pieces:
            self.shrink(piece, step, lr)
            for part, estimate in self.gradient(piece, slopes, step):
                at = piece.start + part.start
                first = self.held("exp_avg", piece.name, at, estimate.numel())
                second = self.held("exp_avg_sq", piece.name, at, estimate.numel())
                first.mul_(beta1).add_(estimate * (1.0 - beta1))
                second.mul_(beta2).add_(estimate.square_().mul_(1.0 - beta2))
                # A step of no length leaves every bit, also the sign of a zero.
                if lr:
                    below = torch.sqrt(second, out=estimate).div_(root).add_(self._eps)
                    self.move(piece, part.start, torch.div(first, below, out=estimate).mul_(length), step)
