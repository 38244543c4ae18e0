"""Parameters that all methods on gradients share: rates, clipping, and the base method."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dsso.clip import ClipMode
from dsso.config import StrictModel
from dsso.optim._estimation import Estimation
from dsso.optim._rules import Rule
from dsso.schedule import ScalarSchedule, bounded

Beta = Annotated[float, Field(ge=0, lt=1)]
Products = Literal["difference", "double_backward"]
"""How products with curvature are made, see `dsso.engines.estimates`."""


class BaseConfig(StrictModel):
    """The base method, for parameters that the method does not take."""

    type: Literal["SGD", "AdamW"] = "AdamW"
    """Rule for the remaining parameters."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the remaining parameters; null: that of the method. Both follow one schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD: m <- momentum m + u."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW: decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the second moment."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay of matrices among the remaining parameters; null: that of the method."""
    applies_to: Literal["rest", "all"] = "rest"
    """`all`: the preconditioned gradients pass through this rule as well, instead of SGD with momentum."""


class AdaptiveTau(StrictModel):
    """A bound that follows the norms of the steps before; `tau` holds until `window` steps were taken."""

    quantile: float = Field(default=0.9, gt=0, lt=1)
    """Of the norms of the last steps, before they were clipped: so large a share of the steps passes."""
    window: int = Field(default=100, ge=2)
    """Steps that are looked back at."""
    factor: float = Field(default=1.0, gt=0)
    """Times the quantile."""


class AdaptiveDamping(StrictModel):
    """A factor on the damping that falls while steps do to the loss what their quadratic model says; fp32 only."""

    interval: int = Field(default=5, ge=1)
    """Steps between two that are judged, each by four more forward passes of its batch."""
    rate: float = Field(default=0.95, gt=0, lt=1)
    """The factor changes by this to the power of `interval`."""
    least: float = Field(default=1e-3, gt=0, le=1)
    """Smallest factor."""
    most: float = Field(default=1e3, ge=1)
    """Largest factor."""
    difference: float = Field(default=1e-3, gt=0, le=0.1)
    """Length of the displacement that J d is taken at, over 1 + the length of all weights that are trained."""


class GradientConfig(StrictModel):
    """What every method on gradients takes."""

    damped: ClassVar[bool] = False
    """Whether it has a `damping` that can follow the loss."""

    lr: float = Field(default=0.05, gt=0)
    """Learning rate; a scheduler section of the recipe multiplies it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """m <- momentum m + u on preconditioned, clipped gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled: weights (not biases, not norms) shrink by lr * weight_decay a step."""
    clip: ClipMode = "post"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the Newton-step norm (`post`)."""
    tau: Annotated[ScalarSchedule, bounded(gt=0)] = 1.0
    """Largest norm over all trainable parameters and ranks, before the learning rate. A schedule."""
    adaptive_tau: AdaptiveTau | None = None
    """The bound as a quantile of the norms of the last steps, instead of `tau`; null: `tau` throughout."""
    adaptive_damping: AdaptiveDamping | None = None
    """A factor on `damping` by the rule of Levenberg and Marquardt, for methods that solve with a damped curvature."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on lr^2 <u, g>, on top of the clip; null: none."""
    warmup_steps: int = Field(default=0, ge=0)
    """So many first steps go along the gradient itself, of first order; statistics are taken meanwhile."""
    warmup_scale: float = Field(default=1.0, gt=0)
    """Times the gradient in these steps: a learning rate of the second order is rarely one of the first."""
    exclude: list[str] = Field(default_factory=list)
    """Regular expressions on module paths: these layers go to the base method."""
    base: BaseConfig = BaseConfig()
    """The base method."""

    @property
    def working(self) -> int:
        """Vectors in fp32 of the size of what it takes that live through windows of estimation, kept ones aside."""
        return 0

    @property
    def products_of_curvature(self) -> Products | None:
        """How products with curvature are made; None where there are none."""
        return None

    def estimation(self, scores: int) -> Estimation:
        """What estimates of curvature ask for in a step on average; here what judges the damping.

        Args:
            scores: of a loss term.
        """
        judged = 0.0 if self.adaptive_damping is None else 1.0 / self.adaptive_damping.interval
        return Estimation(forwards=4 * judged, displacements=3 * judged)

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.adaptive_tau is not None and self.clip == "none":
            raise ValueError("adaptive_tau bounds nothing with clip = none; set clip to pre or post")
        if self.adaptive_damping is not None and not self.damped:
            raise ValueError("adaptive_damping means nothing to a method without a damped curvature")
        return self

    def rules(
        self,
        taken: Collection[str],
        rest: Collection[str],
        matrices: Collection[str],
        kept: tuple[str, ...] = (),
    ) -> dict[str, Rule]:
        """SGD with momentum for what the method takes, the base method for the rest.

        Args:
            taken: parameters of the method.
            rest: the others that are trained.
            matrices: names of parameters of two or more dimensions; others are not decayed.
            kept: what an elementwise method keeps of the elements that it takes.
        """
        base = self.base
        decay = self.weight_decay if base.weight_decay is None else base.weight_decay

        def base_rule(name: str, lr_ratio: float, weight_decay: float) -> Rule:
            decayed = weight_decay if name in matrices else 0.0
            if base.type == "SGD":
                return Rule("sgd", lr_ratio, decayed, base.momentum)
            return Rule("adamw", lr_ratio, decayed, betas=(base.betas[0], base.betas[1]), eps=base.eps)

        rules = {name: base_rule(name, 1.0 if base.lr is None else base.lr / self.lr, decay) for name in rest}
        for name in taken:
            if base.applies_to == "all":
                rule = base_rule(name, 1.0, self.weight_decay)
            else:
                rule = Rule("sgd", 1.0, self.weight_decay if name in matrices else 0.0, self.momentum)
            rules[name] = replace(rule, kept=kept)
        return rules


class HessianConfig(GradientConfig):
    """What a method takes that may look at the Hessian along a probe."""

    hessian: ClassVar[str]
    """The setting with which it does, as in a recipe."""

    products: Products = "difference"
    """H z from gradients at two displaced weights (`difference`, two windows, any engine, fp32 only) or from a double
    backward pass (`double_backward`, one window, not with weights that are sharded)."""
    difference: float = Field(default=1e-3, gt=0, le=0.1)
    """H z by differences: length of the displacement over 1 + the length of all weights that are taken."""
    probe_seed: int = Field(default=0, ge=0)
    """Seed of the probes z of H z."""

    @property
    def estimates_often(self) -> float:
        """Estimates that fall on a step in the long run."""
        raise NotImplementedError

    def estimation(self, scores: int) -> Estimation:
        """Products with the Hessian, of one window by double backward and of two by differences."""
        often = self.estimates_often if self.takes_hessian else 0.0
        if self.products == "double_backward":
            found = Estimation(windows=often, twice=often, directions=often)
        else:
            found = Estimation(windows=2 * often, displacements=2 * often)
        return super().estimation(scores) + found

    @property
    def takes_hessian(self) -> bool:
        """Whether products with the Hessian are made."""
        name, _, wanted = self.hessian.partition(" = ")
        return bool(getattr(self, name) == wanted)

    @property
    def working(self) -> int:
        """The probe; by differences also the first gradient, and the weights as they were."""
        if not self.takes_hessian:
            return 0
        return 3 if self.products == "difference" else 1

    @property
    def products_of_curvature(self) -> Products | None:
        """As `products` says, where they are made."""
        return self.products if self.takes_hessian else None

    @model_validator(mode="after")
    def _products_of_what(self) -> Self:
        for name in HessianConfig.__annotations__.keys() & type(self).model_fields.keys():
            # A resolved recipe writes defaults out.
            if not self.takes_hessian and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing without {self.hessian}")
        return self
