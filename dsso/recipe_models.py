"""Baseline optimizers and learning-rate schedulers of a recipe: DeepSpeed's own, with every field checked.

Unlike DeepSpeed, nothing is read from a hidden default: what a recipe leaves out is written into the
configuration that DeepSpeed gets, so the resolved recipe in a run's `config.json` says all there is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dsso.config import StrictModel, problem

Auto = Literal["auto"]
Steps = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0)]

WARMUP_SHARE = 0.06
"""Share of the steps that `"warmup_num_steps": "auto"` warms up for."""


class AdamWConfig(StrictModel):
    """AdamW by torch's kernel: weight decay apart from the gradient, of matrices only."""

    lr: float = Field(default=1e-3, gt=0.0)
    """Learning rate; a scheduler section multiplies it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Matrices (not biases, not norms) shrink by `lr * weight_decay` a step."""
    torch_adam: Literal[True] = True
    """torch's implementation is the one that is used; DeepSpeed's own is not offered."""

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            allowed = "two numbers, 0 <= beta < 1"
            raise problem("betas are out of range", got=list(self.betas), allowed=allowed)
        return self


class AdamConfig(AdamWConfig):
    """Adam by torch's kernel: weight decay is part of the gradient, unless `adam_w_mode` is true; of matrices only."""

    adam_w_mode: bool = False
    """Weight decay apart from the gradient, which is DeepSpeed's default for Adam and makes it AdamW."""


class SGDConfig(StrictModel):
    """Stochastic gradient descent with torch's momentum; weight decay of matrices only."""

    lr: float = Field(default=1e-2, gt=0.0)
    """Learning rate; a scheduler section multiplies it."""
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the sum of earlier gradients."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Multiple of the weights that is added to the gradient of matrices (not of biases and norms)."""
    nesterov: bool = False
    """Look one step ahead; needs momentum."""

    @model_validator(mode="after")
    def _nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise problem("nesterov needs momentum > 0", remedy="set momentum, e.g. to 0.9")
        return self


BaselineConfig = AdamWConfig | AdamConfig | SGDConfig

BASELINES: dict[str, type[AdamWConfig] | type[SGDConfig]] = {
    "AdamW": AdamWConfig,
    "Adam": AdamConfig,
    "SGD": SGDConfig,
}
"""Baseline optimizers by their name in a recipe."""


class WarmupLR(StrictModel):
    """The learning rate rises to its peak and stays there."""

    warmup_min_lr: Rate | Auto = "auto"
    """Learning rate at the start; auto: 0."""
    warmup_max_lr: Rate | Auto = "auto"
    """Peak; auto: `optimizer.params.lr`, which it must equal."""
    warmup_num_steps: Steps | Auto = "auto"
    """Steps to the peak; auto: 6 % of the run."""
    warmup_type: Literal["log", "linear"] = "linear"
    """Shape of the rise."""


class WarmupDecayLR(WarmupLR):
    """The learning rate rises to its peak and then falls in a line to zero."""

    total_num_steps: Steps | Auto = "auto"
    """Step of zero learning rate; auto: the length of the run."""


class WarmupCosineLR(StrictModel):
    """The learning rate rises to its peak, `optimizer.params.lr`, and then falls in half a cosine wave."""

    total_num_steps: Steps | Auto = "auto"
    """Step at which the fall ends; auto: the length of the run."""
    warmup_min_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the peak at the start."""
    warmup_num_steps: Steps | Auto = "auto"
    """Steps to the peak; auto: 6 % of the run."""
    cos_min_ratio: float = Field(default=1e-4, ge=0.0, le=1.0)
    """Share of the peak at the end."""
    warmup_type: Literal["log", "linear"] = "linear"
    """Shape of the rise."""


class OneCycle(StrictModel):
    """The learning rate rises and falls once (Smith 2018), then decays."""

    cycle_min_lr: float = Field(ge=0.0)
    """Learning rate at both ends of the cycle."""
    cycle_max_lr: float = Field(gt=0.0)
    """Learning rate in the middle of the cycle."""
    decay_lr_rate: float = Field(default=0.0, ge=0.0)
    """Rate of decay after the cycle."""
    cycle_first_step_size: int = Field(default=2000, ge=1)
    """Steps of the rise."""
    cycle_second_step_size: int | None = Field(default=None, ge=1)
    """Steps of the fall; null: as many as of the rise."""
    cycle_first_stair_count: int = Field(default=0, ge=0)
    """Stairs of the rise; 0: smooth."""
    cycle_second_stair_count: int | None = Field(default=None, ge=0)
    """Stairs of the fall; null: as many as of the rise."""
    decay_step_size: int = Field(default=0, ge=0)
    """Steps of one decay after the cycle; 0: none."""
    cycle_momentum: bool = False
    """Move the first beta of the optimizer as well, against the learning rate."""
    cycle_min_mom: float = Field(default=0.8, ge=0.0, lt=1.0)
    """Smallest momentum."""
    cycle_max_mom: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Largest momentum."""
    decay_mom_rate: float = Field(default=0.0, ge=0.0)
    """Rate of decay of the momentum after the cycle."""


class LRRangeTest(StrictModel):
    """The learning rate grows without end, to find the largest that works (Smith 2018)."""

    lr_range_test_min_lr: float = Field(default=1e-3, gt=0.0)
    """Learning rate at the start."""
    lr_range_test_step_size: int = Field(default=2000, ge=1)
    """Steps between two increases."""
    lr_range_test_step_rate: float = Field(default=1.0, gt=0.0)
    """Increase, as a share of the first learning rate."""
    lr_range_test_staircase: bool = False
    """In stairs instead of a line."""


SCHEDULERS: dict[str, type[StrictModel]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
    "OneCycle": OneCycle,
    "LRRangeTest": LRRangeTest,
}
"""Schedulers by their name in a recipe."""


def without_none(params: StrictModel) -> dict[str, Any]:
    """The fields as DeepSpeed takes them: those that are null are left out."""
    return {name: value for name, value in params.model_dump(mode="json").items() if value is not None}
