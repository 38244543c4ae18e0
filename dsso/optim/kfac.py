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
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dsso.clip import ClipMode
from dsso.config import StrictModel
from dsso.curvature.hooks import Approximation, Capture
from dsso.curvature.layers import KroneckerLayer, split_parameters
from dsso.errors import RecipeError, RunError
from dsso.linalg import kron
from dsso.linalg.kron import DampingMode
from dsso.optim._rules import Rule
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred
from dsso.parallel.placement import LayerDims, Placement, assign
from dsso.schedule import Interval, ScalarSchedule, bounded, value

_JITTERS = (1e-6, 1e-4, 1e-2)
"""Relative jitter of the attempts, in fp64, after a factorization failed."""


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
    damping: Annotated[ScalarSchedule, bounded(gt=0)] = 0.01
    """`relative`: lambda over the product of the factors' mean eigenvalues; `absolute`: lambda itself. A schedule."""
    damping_mode: DampingMode = "relative"
    """`relative`: scale-free, split by pi. `absolute`: lambda split by pi. `absolute_each`: lambda on both factors."""
    damping_floor: float = Field(default=1e-3, ge=0)
    """`relative`: share of the model's mean curvature that every layer is credited with at least."""
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


_Sums = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Sum for A and its count, sum for G and its count."""


@dataclass
class _Block:
    """State of one owned layer."""

    layer: KroneckerLayer
    a_II: Tensor
    a_weight: Tensor
    g_OO: Tensor | None
    g_weight: Tensor
    chol_a_II: Tensor
    chol_g_OO: Tensor | None
    ready: Tensor
    """The Cholesky factors belong to a usable pair."""
    attempt: int = 0
    """Index of the next jitter after a failure; 0: the last factorization was good."""


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
        self._blocks = {
            index: self._new_block(layer)
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

    def _new_block(self, layer: KroneckerLayer) -> _Block:
        measured = self.config.fisher != "forward_only"
        side_g = layer.outputs
        return _Block(
            layer=layer,
            a_II=torch.zeros(layer.side_a, layer.side_a, dtype=self._dtype, device=self._device),
            a_weight=torch.zeros((), dtype=self._dtype, device=self._device),
            g_OO=torch.zeros(side_g, side_g, dtype=self._dtype, device=self._device) if measured else None,
            g_weight=torch.zeros((), dtype=self._dtype, device=self._device),
            chol_a_II=torch.eye(layer.side_a, dtype=self._dtype, device=self._device),
            chol_g_OO=torch.eye(side_g, dtype=self._dtype, device=self._device) if measured else None,
            ready=torch.zeros((), dtype=torch.bool, device=self._device),
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
        sums = self._reduced_sums() if collectives.is_distributed() else self._own_sums()
        decay = self.config.ema_decay
        for block, found in zip(self._blocks.values(), sums, strict=True):
            if found is None:
                continue
            a_II, a_count, g_OO, terms = found
            # A layer that no rank used in this window keeps what it has.
            drop = bad | (a_count <= 0)
            keep = torch.where(drop, 1.0, decay)
            block.a_II.mul_(keep).add_(a_II.masked_fill_(drop, 0.0))
            block.a_weight.mul_(keep).add_(a_count.masked_fill(drop, 0.0))
            if block.g_OO is not None and g_OO is not None:
                block.g_OO.mul_(keep).add_(g_OO.masked_fill_(drop, 0.0))
                block.g_weight.mul_(keep).add_(terms.masked_fill(drop, 0.0))

    def _own_sums(self) -> list[_Sums | None]:
        """The window's sums and counts, in a single process; None for a layer that was not used."""
        terms = torch.as_tensor(self.capture.terms, dtype=self._dtype, device=self._device)
        found = [self.capture.sums(index) for index in self._blocks]
        return [None if s is None else (s.a_II, s.a_count, s.g_OO, terms) for s in found]

    def _reduced_sums(self) -> list[_Sums | None]:
        """The window's sums and counts of the layers that this rank owns, summed over all ranks."""
        terms = torch.as_tensor(self.capture.terms, dtype=self._dtype, device=self._device).reshape(1)
        pieces: list[Tensor | None] = []
        sizes = []
        for owner in range(self.placement.world_size):
            parts: list[Tensor] = []
            for index, layer in enumerate(self.layers):
                if self.placement.owner[layer.name] == owner:
                    parts.extend(self._packed(index, layer))
            parts.append(terms)
            pieces.append(torch.cat(parts))
            sizes.append(pieces[-1].numel())  # type: ignore[union-attr]
        got = collectives.reduce_to_owners(pieces, sizes, terms)
        out: list[_Sums | None] = []
        at = 0

        def take(count: int) -> Tensor:
            nonlocal at
            at += count
            return got.narrow(0, at - count, count)

        for block in self._blocks.values():
            side_a, side_g = block.layer.side_a, block.layer.outputs
            a_II = kron.unpack(take(kron.packed_size(side_a)), side_a)
            a_count = take(1).reshape(())
            g_OO = kron.unpack(take(kron.packed_size(side_g)), side_g) if block.g_OO is not None else None
            out.append((a_II, a_count, g_OO, got[-1]))
        return out

    def _packed(self, index: int, layer: KroneckerLayer) -> list[Tensor]:
        """Packed triangle of A, its count and packed triangle of G; zeros for a layer that was not used."""
        sums = self.capture.sums(index)
        measured = self.config.fisher != "forward_only"
        if sums is None:
            size = kron.packed_size(layer.side_a) + 1 + (kron.packed_size(layer.outputs) if measured else 0)
            return [torch.zeros(size, dtype=self._dtype, device=self._device)]
        parts = [kron.pack(sums.a_II), sums.a_count.reshape(1)]
        if sums.g_OO is not None:
            parts.append(kron.pack(sums.g_OO))
        return parts

    # -- factorization ------------------------------------------------------------------------------------------

    def _refresh(self, step: int) -> None:
        """Factorize all owned layers with the damping of this step."""
        self._damping = value(self.config.damping, step)
        self._refreshed_at = step
        self._floor = self.config.damping_floor * self._mean_curvature()
        flags = [self._factorize(block, self._dtype, 0.0) for block in self._blocks.values()]
        if flags:
            self._failed.push(torch.stack(flags).to(torch.float32))

    def _mean_curvature(self) -> Tensor:
        """Mean over all layers of the product of their factors' mean eigenvalues; collective."""
        total = torch.zeros(1, dtype=self._dtype, device=self._device)
        for block in self._blocks.values():
            means = [kron.mean_eigenvalue(block.a_II) / block.a_weight.clamp_min(kron.TINY)]
            if block.g_OO is not None:
                means.append(kron.mean_eigenvalue(block.g_OO) / block.g_weight.clamp_min(kron.TINY))
            total += torch.stack(means).prod()
        return collectives.all_sum(total)[0] / len(self.layers)

    def _factorize(self, block: _Block, dtype: torch.dtype, jitter: float) -> Tensor:
        """Factorize one layer; the last good factors stay where it fails.

        Returns:
            Whether a usable pair failed to factorize, a boolean scalar tensor.
        """
        a_II = block.a_II.to(dtype) / block.a_weight.clamp_min(kron.TINY)
        mean_a = kron.mean_eigenvalue(a_II)
        if block.g_OO is None or block.chol_g_OO is None:
            g_OO, mean_g = None, torch.ones_like(mean_a)
        else:
            g_OO = block.g_OO.to(dtype) / block.g_weight.clamp_min(kron.TINY)
            mean_g = kron.mean_eigenvalue(g_OO)
        floor = self._floor.to(dtype)
        damping = kron.split_damping(mean_a, mean_g, self._damping, self.config.damping_mode, floor)
        chol_a_II, failed = kron.cholesky(a_II, damping.lambda_a, jitter)
        chol_g_OO = None
        if g_OO is not None:
            chol_g_OO, failed_g = kron.cholesky(g_OO, damping.lambda_g, jitter)
            failed = failed | failed_g
        take = damping.usable & ~failed
        block.chol_a_II = torch.where(take, chol_a_II.to(self._dtype), block.chol_a_II)
        if chol_g_OO is not None and block.chol_g_OO is not None:
            block.chol_g_OO = torch.where(take, chol_g_OO.to(self._dtype), block.chol_g_OO)
        block.ready = block.ready | take
        return damping.usable & failed

    def _retry_failed(self) -> None:
        """Factorize again, in fp64 and with jitter, what failed a step ago."""
        flags = self._failed.pop()
        if flags is None:
            return
        again = []
        for flag, block in zip(flags, self._blocks.values(), strict=True):
            if not flag:
                block.attempt = 0
                again.append(torch.zeros((), dtype=torch.bool, device=self._device))
                continue
            self._failures += 1
            if block.attempt >= len(_JITTERS):
                # The last good factors stay until the next refresh.
                block.attempt = 0
                again.append(torch.zeros((), dtype=torch.bool, device=self._device))
                continue
            again.append(self._factorize(block, torch.float64, _JITTERS[block.attempt]))
            block.attempt += 1
        if any(flags):
            self._failed.push(torch.stack(again).to(torch.float32))

    # -- the update ---------------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """U = G^-1 M A^-1 for the owned layers; zero for a layer without usable factors."""
        updates: dict[str, Tensor] = {}
        waiting = torch.zeros((), dtype=self._dtype, device=self._device)
        for block in self._blocks.values():
            layer = block.layer
            m_OI = self._as_matrix(layer, gradients)
            u_OI = kron.solve(m_OI, block.chol_g_OO, block.chol_a_II)
            u_OI = torch.where(block.ready, u_OI, torch.zeros_like(u_OI))
            waiting = waiting + (~block.ready & (m_OI != 0).any()).to(self._dtype)
            w_OI = u_OI[:, : layer.inputs]
            updates[layer.weight] = (w_OI.mT if layer.transposed else w_OI).reshape(-1)
            if layer.bias is not None:
                updates[layer.bias] = u_OI[:, layer.inputs].reshape(-1)
        return updates, waiting

    @staticmethod
    def _as_matrix(layer: KroneckerLayer, gradients: Mapping[str, Tensor]) -> Tensor:
        """The layer's gradient, [outputs, inputs (+1)]."""
        flat = gradients[layer.weight]
        if layer.transposed:
            m_OI = flat.view(layer.inputs, layer.outputs).mT
        else:
            m_OI = flat.view(layer.outputs, layer.inputs)
        if layer.bias is None:
            return m_OI
        return torch.cat([m_OI, gradients[layer.bias].view(-1, 1)], dim=1)

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
        out: dict[str, Tensor] = {}
        for block in self._blocks.values():
            name = block.layer.name
            out[f"{name}/a"], out[f"{name}/a_weight"] = block.a_II, block.a_weight
            out[f"{name}/chol_a"], out[f"{name}/ready"] = block.chol_a_II, block.ready
            if block.g_OO is not None and block.chol_g_OO is not None:
                out[f"{name}/g"], out[f"{name}/g_weight"] = block.g_OO, block.g_weight
                out[f"{name}/chol_g"] = block.chol_g_OO
        return out

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
        """Ages and pending retries. Retries are this rank's own, so all ranks' are written and each reads its own."""
        return {
            "refreshed_at": self._refreshed_at,
            "damping": self._damping,
            "steps": self._steps,
            "retries": {b.layer.name: b.attempt for b in self._blocks.values() if b.attempt},
            "failed": dict(
                zip((b.layer.name for b in self._blocks.values()), self._failed.peek() or [], strict=False)
            ),
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned."""
        self._refreshed_at = counters["refreshed_at"]
        self._steps = int(counters["steps"])
        self._damping = float(counters["damping"])
        for block in self._blocks.values():
            block.attempt = int(counters["retries"].get(block.layer.name, 0))
        failed = counters["failed"]
        if failed:
            self._failed.push(torch.tensor([failed.get(b.layer.name, 0.0) for b in self._blocks.values()]))

    def close(self) -> None:
        """Take the hooks off the model."""
        self.capture.remove()
