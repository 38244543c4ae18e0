"""K-FAC: Kronecker-factored approximate curvature for linear layers, factors owned by one rank each.

For a layer s = W [x; 1] with loss gradient g at s, its block of the Fisher is approximated by A (x) G with
A = E[[x; 1][x; 1]^T] and G = E[g g^T], and the update is

    U = (G + l_G I)^-1 M (A + l_A I)^-1,        M = dL/dW, a bias as one more column       (M & G 2015, eq. 12)

A and G are debiased moving averages: sums and counts decay alike, S <- beta S + sum, N <- beta N + count,
average S/N. Factors and their Cholesky factors live on the layer's owner; statistics are reduced to it, gradients
come to it and updates go back through `dsso.parallel.fragments`.

Legend of shape suffixes: `I` inputs (+1 for a bias), `O` outputs.

Sources: Martens and Grosse 2015 (blocks, pi-split damping); Eschenhagen et al. 2023 (expand, reduce); Benzing 2022
(forward-only: G = I); "Applying second order optimization to deep transformers with parameter-efficient tuning"
2023 (Newton-step clipping, intervals). Deviations from the last: factors are on the scale of one loss term instead
of the mean loss, averages are debiased, padding is masked out, damping is relative by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dsso.clip import ClipMode
from dsso.config import StrictModel
from dsso.curvature.hooks import Approximation, Capture
from dsso.curvature.layers import KroneckerLayer, split_parameters
from dsso.errors import RecipeError, RunError
from dsso.linalg.kron import DampingMode
from dsso.optim._blocks import JITTERS, Block
from dsso.optim._rules import Rule
from dsso.optim._statistics import window_sums
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred
from dsso.parallel.placement import LayerDims, Placement, assign
from dsso.schedule import Interval, ScalarSchedule, bounded, value

Beta = Annotated[float, Field(ge=0, lt=1)]


class BaseConfig(StrictModel):
    """The base method, for parameters that K-FAC does not take."""

    type: Literal["SGD", "AdamW"] = "AdamW"
    """Rule for the remaining parameters."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the remaining parameters; null: that of K-FAC. Both follow one schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD: m <- momentum m + u."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW: decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the second moment."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay of matrices among the remaining parameters; null: that of K-FAC."""
    applies_to: Literal["rest", "all"] = "rest"
    """`all`: the preconditioned gradients pass through this rule as well, instead of SGD with momentum."""


class Config(StrictModel):
    """Parameters of K-FAC (`optimizer.params`)."""

    lr: float = Field(default=0.05, gt=0)
    """Learning rate of a Newton step; a scheduler section of the recipe multiplies it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """m <- momentum m + u on preconditioned, clipped gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled: weights (not biases, not norms) shrink by lr * weight_decay a step."""
    damping: Annotated[ScalarSchedule, bounded(gt=0)] = 0.1
    """`relative`: lambda over the product of the factors' mean eigenvalues; `absolute`: lambda itself. A schedule."""
    damping_mode: DampingMode = "relative"
    """`relative`: scale-free, split by pi. `absolute`: lambda split by pi. `absolute_each`: lambda on both factors."""
    damping_floor: float = Field(default=1.0, ge=0)
    """`relative`: lambda gets this multiple of the model's mean curvature on top, the same for every layer."""
    factor_interval: Interval = Interval(((0, 1), (20, 10)))
    """Steps between two measurements of A and G, with early repeats; null in a segment: never again."""
    inverse_interval: Interval = Interval(((0, 1), (20, 100)))
    """Steps between two factorizations, with early repeats; null in a segment: never again."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the debiased averages of the statistics, per measurement."""
    fisher: Literal["empirical", "sampled", "forward_only"] = "empirical"
    """Labels behind G: the data's, drawn from the model (one more pass), or none (G = I)."""
    approximation: Approximation = "expand"
    """Weight sharing over tokens: each token an example, or mean of inputs and sum of gradients."""
    clip: ClipMode = "post"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the Newton-step norm (`post`)."""
    tau: Annotated[ScalarSchedule, bounded(gt=0)] = 1.0
    """Largest norm over all trainable parameters and ranks, before the learning rate. A schedule."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on lr^2 <u, g>, on top of the clip; null: none."""
    max_side: int = Field(default=16384, ge=1)
    """Layers with a wider side go to the base method."""
    exclude: list[str] = Field(default_factory=list)
    """Regular expressions on module paths: these layers go to the base method."""
    base: BaseConfig = BaseConfig()
    """The base method."""


class Method(GradientMethod):
    """K-FAC on the layers of a model.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where factors live.
        rank, world_size: this process among those that share the layers.

    Raises:
        RecipeError: when the model has no layer for K-FAC, or a pattern of `exclude` is none.
    """

    def __init__(
        self, config: Config, model: nn.Module, device: torch.device, rank: int, world_size: int
    ) -> None:
        self.config = config
        self.rank = rank
        split = split_parameters(model, config.exclude, config.max_side)
        if not split.layers:
            reasons = sorted(set(split.rest.values())) or ["no parameter is trainable"]
            raise RecipeError(
                "the model has no layer for K-FAC",
                where="optimizer.type",
                got=", ".join(reasons[:6]),
                allowed="trainable nn.Linear or Conv1D layers",
                remedy="train linear layers (LoRA, adapters, a prefix with projection, all weights) or use AdamW",
            )
        self.rest = split.rest
        self.layers = split.layers
        self.placement: Placement = assign([self._dims(layer) for layer in self.layers], world_size)
        self.owners = {
            name: self.placement.owner[layer.name] for layer in self.layers for name in layer.parameters
        }
        doubles = any(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
        self._dtype = torch.float64 if doubles else torch.float32
        measured = config.fisher != "forward_only"
        self.capture = Capture(model, self.layers, config.approximation, measured, self._dtype)
        self.capture.take_g = config.fisher == "empirical"
        self._device = device
        like = torch.zeros((), dtype=self._dtype, device=device)
        self._like = like
        self._blocks = {
            index: Block(layer, measured, like)
            for index, layer in enumerate(self.layers)
            if self.placement.owner[layer.name] == rank
        }
        self._failed = Deferred()
        self._failures = 0
        self._damping = value(config.damping, 0)
        self._refreshed_at: int | None = None
        self._steps = 0
        self._retry = False
        self._floor = torch.zeros((), dtype=self._dtype, device=device)
        self._matrices = {n for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1}

    def rules(self) -> dict[str, Rule]:
        """SGD with momentum for the layers, the base method for the rest; biases and norms are not decayed."""
        config, base = self.config, self.config.base
        ratio = 1.0 if base.lr is None else base.lr / config.lr
        decay = config.weight_decay if base.weight_decay is None else base.weight_decay

        def base_rule(name: str, lr_ratio: float, weight_decay: float) -> Rule:
            decayed = weight_decay if name in self._matrices else 0.0
            if base.type == "SGD":
                return Rule("sgd", lr_ratio, decayed, base.momentum)
            return Rule("adamw", lr_ratio, decayed, betas=(base.betas[0], base.betas[1]), eps=base.eps)

        rules = {name: base_rule(name, ratio, decay) for name in self.rest}
        for name in self.owners:
            if base.applies_to == "all":
                rules[name] = base_rule(name, 1.0, config.weight_decay)
            else:
                decayed = config.weight_decay if name in self._matrices else 0.0
                rules[name] = Rule("sgd", 1.0, decayed, config.momentum)
        return rules

    def _dims(self, layer: KroneckerLayer) -> LayerDims:
        return LayerDims(
            layer.name, layer.side_a, 0 if self.config.fisher == "forward_only" else layer.outputs
        )

    # -- a window -----------------------------------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Decide whether the window's passes are measured."""
        self.capture.reset()
        self._retry = retry
        self.capture.active = retry or self.config.factor_interval.due(step)

    def before_backward(self, scale: float | Tensor, terms: float | Tensor) -> None:
        """Set the scale of the output gradients to come and count the loss terms behind them."""
        self.capture.scale = scale
        if self.capture.active:
            self.capture.terms = self.capture.terms + terms

    @contextmanager
    def sampled_pass(self) -> Iterator[None]:
        """Within it the passes give G and no A."""
        capture = self.capture
        capture.take_a, capture.take_g = False, True
        try:
            yield
        finally:
            capture.take_a, capture.take_g = True, False

    def wants_sampled_pass(self) -> bool:
        """True in measured windows of the sampled Fisher."""
        return self.capture.active and self.config.fisher == "sampled"

    def measured_badly(self) -> Tensor | None:
        """Whether any sum of the window is not finite on this rank; None when nothing was measured."""
        if not self.capture.active:
            return None
        bad = torch.zeros((), dtype=torch.bool, device=self._device)
        for index in range(len(self.layers)):
            sums = self.capture.sums(index)
            if sums is not None:
                # The trace is finite exactly when no squared entry on the diagonal overflowed or is NaN; any
                # non-finite row shows there.
                bad = bad | ~torch.isfinite(sums.a_II.diagonal().sum())
                if sums.g_OO is not None:
                    bad = bad | ~torch.isfinite(sums.g_OO.diagonal().sum())
        return bad

    def update(self, step: int, bad: Tensor | None) -> None:
        """Reduce the window's sums to their owners, average, and factorize what is due."""
        self._steps = step + 1
        self._retry_failed()
        if bad is not None:
            self._average(bad)
            self.capture.reset()
        if self.config.inverse_interval.due(step) or self._retry or self._refreshed_at is None:
            self._refresh(step)
        self._retry = False
        self.capture.active = False

    def _average(self, bad: Tensor) -> None:
        """S <- beta S + sum and N <- beta N + count at the owners, in place; nothing where `bad`."""
        for index, sums in window_sums(self.capture, self.placement, self.rank, self._like):
            if sums is not None:
                self._blocks[index].average(sums, bad, self.config.ema_decay)

    # -- factorization ------------------------------------------------------------------------------------------

    def _refresh(self, step: int) -> None:
        """Factorize all owned layers with the damping of this step."""
        self._damping = value(self.config.damping, step)
        self._refreshed_at = step
        self._floor = self.config.damping_floor * self._mean_curvature()
        flags = [self._factorize(block) for block in self._blocks.values()]
        for block in self._blocks.values():
            block.attempt = 0
        if flags:
            self._failed.push(torch.stack(flags).to(torch.float32))

    def _mean_curvature(self) -> Tensor:
        """Mean over all layers of the product of their factors' mean eigenvalues; collective."""
        total = self._like.new_zeros(1)
        for block in self._blocks.values():
            mean_a, mean_g = block.means()
            total += mean_a * mean_g
        return collectives.all_sum(total)[0] / len(self.layers)

    def _factorize(self, block: Block, jitter: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        return block.factorize(self._damping, self.config.damping_mode, self._floor, jitter, dtype)

    def _retry_failed(self) -> None:
        """Factorize again, in fp64 and with jitter, what failed a step ago."""
        flags = self._failed.pop()
        if flags is None or not any(flags):
            return
        again = []
        for flag, block in zip(flags, self._blocks.values(), strict=True):
            self._failures += bool(flag)
            if flag and block.attempt < len(JITTERS):
                again.append(self._factorize(block, JITTERS[block.attempt], torch.float64))
                block.attempt += 1
            else:
                # Good, or given up: the last good factors stay until the next refresh.
                again.append(torch.zeros_like(block.ready))
        self._failed.push(torch.stack(again).to(torch.float32))

    # -- the update ---------------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """U = G^-1 M A^-1 for the owned layers; zero for a layer without usable factors."""
        updates: dict[str, Tensor] = {}
        waiting = self._like.clone()
        for block in self._blocks.values():
            found, waits = block.precondition(gradients)
            updates.update(found)
            waiting = waiting + waits.to(waiting.dtype)
        return updates, waiting

    # -- state --------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Damping, age of the factors, failures and layers that wait for a usable pair (this rank's)."""
        ready = [block.ready for block in self._blocks.values()]
        return {
            "damping": self._damping,
            "factor_age": float(self._steps - 1 - self._refreshed_at)
            if self._refreshed_at is not None
            else -1.0,
            "factor_failures": float(self._failures),
            "layers_without_factors": float((~torch.stack(ready)).sum().item()) if ready else 0.0,
        }

    def state_bytes(self) -> int:
        """Bytes of factors and Cholesky factors on this rank."""
        return sum(t.numel() * t.element_size() for t in self.state_tensors().values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Factors, weights and Cholesky factors by layer name."""
        return {name: tensor for block in self._blocks.values() for name, tensor in block.state().items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the owned layers' state; the refresh age comes with `load_counters`."""
        for key, mine in self.state_tensors().items():
            if key not in tensors:
                raise RunError(
                    "the checkpoint lacks state of K-FAC",
                    where=key,
                    remedy="was it written by another model?",
                )
            found = tensors[key]
            if found.shape != mine.shape:
                raise RunError(
                    "the checkpoint's state has another shape",
                    where=key,
                    got=tuple(found.shape),
                    allowed=str(tuple(mine.shape)),
                )
            mine.copy_(found)

    def counters(self) -> dict[str, Any]:
        """Ages for all, pending retries by layer."""
        failed = self._failed.peek() or [0.0] * len(self._blocks)
        return {
            "common": {
                "refreshed_at": self._refreshed_at,
                "damping": self._damping,
                "steps": self._steps,
            },
            "owned": {
                block.layer.name: {"attempt": block.attempt, "failed": flag}
                for block, flag in zip(self._blocks.values(), failed, strict=True)
                if block.attempt or flag
            },
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what the owners' `counters` returned, put together."""
        common, owned = counters["common"], counters["owned"]
        self._refreshed_at = common["refreshed_at"]
        self._steps = int(common["steps"])
        self._damping = float(common["damping"])
        found = [owned.get(block.layer.name, {}) for block in self._blocks.values()]
        for block, told in zip(self._blocks.values(), found, strict=True):
            block.attempt = int(told.get("attempt", 0))
        failed = [float(told.get("failed", 0.0)) for told in found]
        if any(failed):
            self._failed.push(torch.tensor(failed))

    def close(self) -> None:
        """Take the hooks off the model."""
        self.capture.remove()
