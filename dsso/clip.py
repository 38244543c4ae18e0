"""Clipping by gradient norm, by Newton-step norm and by the KL bound, from one fused reduction.

With u the preconditioned gradient of all trainable parameters, those of the base method included:

- pre    g <- min(1, tau / ||g||) g before preconditioning. A Kronecker preconditioner is linear in g,
         so the factor may as well be applied to u: no second pass over the gradient is needed.
- post   u <- min(1, tau / ||u||) u, the Newton-step clip.
- KL     u <- min(1, sqrt(kappa / (lr^2 <u, g>))) u bounds the change of the predictions of one step.

The learning rate and the weight decay come after. Nothing here synchronizes with the host. `tau` may follow the norms
of the steps before (`NormQuantile`), the adaptive clipping that the paper leaves to future work.

Source: pre and post: Algorithm 1 of "Applying second order optimization to deep transformers with
parameter-efficient tuning" (2023). KL: Ba, Grosse, Martens 2017, section 5, as used by public K-FAC code.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ClipMode = Literal["none", "pre", "post"]


class StepNorms(NamedTuple):
    """Global scalars of a step, the same on every rank.

    Attributes:
        uu: ||u||^2 before clipping. ug: <u, g>. gg: ||g||^2 before clipping.
        bad: boolean, the step is not finite and must be dropped.
    """

    uu: Tensor
    ug: Tensor
    gg: Tensor
    bad: Tensor


def clip_scale(
    norms: StepNorms, mode: ClipMode, tau: float | Tensor, kl_clip: float | None = None, lr: float = 1.0
) -> Tensor:
    """Factor in (0, 1] for the whole update, a scalar tensor.

    Args:
        norms: of the whole update, summed over all ranks.
        mode: what `tau` bounds: nothing, ||g|| or ||u||.
        tau: largest norm, in the units of g (`pre`) or of a parameter (`post`).
        kl_clip: kappa, or None.
        lr: learning rate of the step, for the KL bound only.
    """
    scale = torch.ones_like(norms.uu)
    if mode == "pre":
        scale = (tau / norms.gg.sqrt()).clamp(max=1.0)
    elif mode == "post":
        scale = (tau / norms.uu.sqrt()).clamp(max=1.0)
    if kl_clip is not None and lr > 0:
        # The scaled step su changes the predictions by s^2 u^T F u = s^2 <u, g>.
        bound = (kl_clip / (lr * lr * scale.square() * norms.ug.abs())).sqrt()
        scale = scale * torch.where(torch.isnan(bound), 1.0, bound.clamp(max=1.0))
    # 0/0 of a zero gradient: nothing to clip.
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


class NormQuantile:
    """A bound that follows the norms: a quantile of those of the last steps, times a factor.

    Every rank has the same norms, so the bound is the same without a message.

    Args:
        quantile: in (0, 1).
        window: so many steps are looked back at; before that many were taken, the given bound holds.
        factor: times the quantile.

    Attributes:
        norms: of the last steps, [window]; NaN where none is known.
    """

    def __init__(self, quantile: float, window: int, factor: float) -> None:
        self.quantile = quantile
        self.window = window
        self.factor = factor
        self.norms = torch.full((window,), math.nan)

    def bound(self, otherwise: float) -> Tensor:
        """The bound of the step to come, a scalar tensor.

        Args:
            otherwise: the bound while the window is not full.
        """
        full = self.norms.isfinite().all()
        level = self.norms.nan_to_num().quantile(self.quantile) * self.factor
        return torch.where(full, level, otherwise)

    def note(self, step: int, norm: Tensor, bad: Tensor) -> None:
        """Take in the norm of a step before clipping; one that is dropped leaves its place as it was.

        Args:
            step: its number.
            norm: of what is bounded.
            bad: boolean scalar.
        """
        place = self.norms[step % self.window]
        place.copy_(torch.where(bad, place, norm.to(place.dtype)))

    def state(self) -> list[float | None]:
        """The norms as JSON."""
        return [None if math.isnan(norm) else norm for norm in self.norms.tolist()]

    def load(self, state: list[float | None] | None) -> None:
        """Take over what `state` gave; another length begins anew."""
        known = [math.nan if norm is None else norm for norm in state or []]
        if len(known) == self.window:
            self.norms.copy_(torch.tensor(known))


def cosine(norms: StepNorms) -> Tensor:
    """cos(u, g); 1 where either is zero (a step of nothing is no step away from the gradient)."""
    length = (norms.uu * norms.gg).sqrt()
    return torch.where(length > 0, norms.ug / length, torch.ones_like(length))
