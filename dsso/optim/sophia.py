"""Sophia: clipped steps over a diagonal of the curvature, estimated now and then.

    Sophia-G, the Gauss-Newton matrix from sampled labels:
    q    = gradient of the mean loss at labels drawn from the model, averaged over all ranks, not clipped
    h    <- beta2 h + (1 - beta2) B q o q            every `estimate_interval` steps; B: loss terms of that window
    Sophia-H, the Hessian from one probe z of random signs, the same on all ranks:
    h    <- beta2 h + (1 - beta2) z o H z            every `estimate_interval` steps
    both:
    m    <- beta1 m + (1 - beta1) g                  every step
    u    = clip(m / max(gamma h, f gamma mean|h|, eps), -1, 1)

E[B q o q] is the diagonal of the Gauss-Newton matrix of the mean loss: gradients at sampled labels have mean zero and
are independent from term to term, so squares of their sum are the sum of their squares. B counts the terms that the
mean is over, those of all ranks together and none that is masked out.

E[z o H z] is the diagonal of the Hessian; H z is linear in the loss, so its mean over micro-batches and ranks is that
of the whole batch. Where the diagonal is negative the least divisor counts.

Source: Liu, Li, Hall, Liang, Ma 2023, algorithms 1 (Hutchinson), 2 (Gauss-Newton-Bartlett) and 3. Deviations: the
floor f, without which an element that no estimate has reached takes a step of full size along the sign of its rounding
errors (0: as published); clipping by `tau`, momentum and decay as for all methods here, after u.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dsso.clip import ClipMode
from dsso.optim._elementwise import ElementwiseConfig, ElementwiseMethod
from dsso.optim._estimating import Estimate, HessianProduct, Pieces, State
from dsso.optim._estimation import Estimation
from dsso.optim._gradient_config import HessianConfig
from dsso.parallel import collectives
from dsso.schedule import Interval

__all__ = ["Config", "Method"]

FIRST, DIAGONAL = "sophia_m", "sophia_h"
"""Names under which m and h lie in the optimizer's state."""


class Config(HessianConfig, ElementwiseConfig):
    """Parameters of Sophia (`optimizer.params`)."""

    kept: ClassVar[tuple[str, ...]] = (FIRST, DIAGONAL)
    hessian: ClassVar[str] = "estimator = hutchinson"

    lr: float = Field(default=3e-4, gt=0)
    """Learning rate, somewhat below Adam's: no element moves further than it in a step."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """m <- momentum m + u on clipped updates, on top of `beta1`."""
    clip: ClipMode = "none"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the norm of the update (`post`), at most the root of the
    number of elements."""
    estimate_interval: Interval = Interval(((0, 10),))
    """Steps between two estimates of curvature, each of windows of its own; null in a segment: never again."""
    estimator: Literal["gnb", "hutchinson"] = "gnb"
    """Diagonal of the Gauss-Newton matrix (`gnb`, Sophia-G) or of the Hessian (`hutchinson`, Sophia-H)."""
    beta1: float = Field(default=0.96, ge=0, lt=1)
    """Decay of the averaged gradient."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged diagonal, per estimate."""
    gamma: float = Field(default=0.05, gt=0)
    """Times the diagonal: the smaller, the more elements are clipped."""
    eps: float = Field(default=1e-12, gt=0)
    """Least divisor."""
    floor: float = Field(default=0.01, ge=0, lt=1)
    """Elements of h below this share of the mean size of all count as that; 0: as published."""

    @property
    def estimates_often(self) -> float:
        """By the last segment of the interval."""
        return self.estimate_interval.often

    def estimation(self, scores: int) -> Estimation:
        """One window at sampled labels, or what a product with the Hessian takes."""
        sampled = 0.0 if self.takes_hessian else self.estimates_often
        return super().estimation(scores) + Estimation(windows=sampled)


class Method(ElementwiseMethod):
    """Sophia on all matrices and vectors that are trained.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where state lives.
        rank, world_size, example: not used: nothing has an owner and nothing is measured in modules.

    Raises:
        RecipeError: a pattern of `exclude` is none, or everything is excluded.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, model, device, "Sophia")
        self.config = config
        self.products, self.difference = config.products, config.difference
        self._mean = torch.zeros((), device=device)
        self._probe: list[Tensor] | None = None
        self._product = HessianProduct()
        self._had = -1
        self._free = torch.zeros(1, device=device)
        self._share = torch.ones((), device=device)
        self._terms: float | Tensor = 0.0
        self._estimates = 0

    # -- a window -------------------------------------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Count the loss terms of a window from zero."""
        self._terms = 0.0

    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """Count the loss terms."""
        self._terms = self._terms + terms

    def wants_estimate(self, step: int) -> Estimate | None:
        """Sampled labels, or the Hessian along a probe, where the interval says so."""
        start, every = self.config.estimate_interval.segment(step)
        if every is None or (step - start) % every or self._had == step:
            return None
        if self.config.estimator == "gnb":
            return "sampled"
        return "hessian" if self.products == "double_backward" else "gradient_pair"

    def had_estimate(self, step: int) -> None:
        """Two windows are one estimate where differences are taken."""
        self._had = step

    def direction(self, pieces: Pieces, step: int) -> Sequence[Tensor]:
        """The probe of that step."""
        if self._probe is None:
            self._probe = pieces.probe(self.config.probe_seed, step)
        return self._probe

    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, pieces: Pieces
    ) -> None:
        """Take in one window: B q o q, or what the probe says of the Hessian."""
        if self.config.estimator == "gnb":
            terms = self._mean.new_zeros(1) + self._terms
            count = collectives.all_sum(terms)[0]
            self._average([q.square() * count for q in gradients], states, take, pieces.weight)
            return
        assert self._probe is not None
        found = self._product.take_in(self, gradients, take)
        if found is None:
            return
        products, take = found
        diagonal = [z * hz for z, hz in zip(self._probe, products, strict=True)]
        self._average(diagonal, states, take, pieces.weight)
        self._probe = None

    def _average(self, found: Sequence[Tensor], states: Sequence[State], take: Tensor, weight: float) -> None:
        """H <- beta2 h + (1 - beta2) what was found, and its mean over all elements."""
        total = self._mean.new_zeros(1)
        for one, state in zip(found, states, strict=True):
            h = state[DIAGONAL]
            new = torch.lerp(h, one, 1 - self.config.beta2)
            h.copy_(torch.where(take, new, h))
            total = total + h.abs().sum()
        self._mean = collectives.all_sum(total * weight)[0] / self._chosen.size
        self._estimates += 1

    def measured_badly(self) -> Tensor:
        """Nothing of its own, but m is a statistic of gradients: all ranks have to agree that they are finite."""
        return torch.zeros((), dtype=torch.bool, device=self._mean.device)

    # -- the update -----------------------------------------------------------------------------------------------

    def act(self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor) -> list[Tensor]:
        """U = clip(m / max(gamma h, f gamma mean|h|, eps), -1, 1)."""
        config, updates = self.config, []
        least = (config.gamma * config.floor * self._mean).clamp_min(config.eps)
        self._free = self._free.new_zeros(1)
        for g, state in zip(gradients, states, strict=True):
            m = state[FIRST]
            m.copy_(torch.where(take, torch.lerp(m, g, 1 - config.beta1), m))
            ratio = m / torch.maximum(config.gamma * state[DIAGONAL], least)
            self._free += (ratio.abs() < 1).sum()
            updates.append(torch.where(take, ratio.clamp(-1.0, 1.0), torch.zeros_like(ratio)))
        return updates

    def counts(self) -> Tensor:
        """Elements of this rank's pieces that were not clipped."""
        return self._free

    def note(self, counts: Tensor) -> None:
        """Learn how many elements were not clipped, over all ranks."""
        self._share = counts[0] / self._chosen.size

    # -- state ----------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """`win_rate`, the share of elements that were not clipped, and the number of estimates."""
        return {"win_rate": float(self._share), "estimates": float(self._estimates)}

    def counters(self) -> dict[str, Any]:
        """The mean size of h and the number of estimates."""
        return {"common": {"mean": float(self._mean), "estimates": self._estimates}, "owned": {}}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned."""
        common = counters["common"]
        self._mean = self._mean.new_tensor(common["mean"])
        self._estimates = int(common["estimates"])
