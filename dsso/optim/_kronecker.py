"""What K-FAC and its kin do alike: measure, reduce to the owners, factorize, and keep state; see `dsso.optim.kfac`.

A method says what a factor keeps (`_factor`) and what becomes of a gradient (`_apply`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dsso.curvature.hooks import Capture
from dsso.curvature.layers import split_parameters
from dsso.errors import RecipeError
from dsso.optim._factor import Factor
from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim._kronecker_layout import layer_dims
from dsso.optim._layer import LayerPair
from dsso.optim._refresh import Refresh, Stagger
from dsso.optim._rules import Rule
from dsso.optim._statistics import Statistics
from dsso.optim.base import GradientMethod, state_like, take_over
from dsso.parallel.placement import FactorDims, Placement, assign
from dsso.schedule import value


class KroneckerMethod(GradientMethod):
    """A method with a pair of Kronecker factors for each layer of a model.

    Args:
        config: its parameters.
        model: the unwrapped model, its weights whole.
        device: where factors live.
        rank, world_size: this process among those that share the layers.
        example: keyword arguments of a small forward pass, to find out which layers read the same tensor; None:
            those of a Hugging Face model are made up, other models share nothing.

    Raises:
        RecipeError: when the model has no layer for the method, or a pattern of `exclude` is none.
    """

    def __init__(
        self,
        config: KroneckerConfig,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.rank = rank
        split = split_parameters(model, config.exclude, config.max_side)
        if not split.layers:
            reasons = sorted(set(split.rest.values())) or ["no parameter is trainable"]
            raise RecipeError(
                f"the model has no layer for {config.title}",
                where="optimizer.type",
                got=", ".join(reasons[:6]),
                allowed="trainable nn.Linear or Conv1D layers",
                remedy="train linear layers (LoRA, adapters, a prefix with projection, all weights) or use AdamW",
            )
        self.rest = split.rest
        self.layers = split.layers
        dims = layer_dims(config, model, self.layers, example)
        self.placement: Placement = assign(dims, world_size, config.strategy, config.grad_worker_fraction)
        self.workers = {
            name: self.placement.appliers[layer.name] for layer in self.layers for name in layer.parameters
        }
        self.owners = {name: ranks[0] for name, ranks in self.workers.items()}
        self._like = state_like(model, device)
        self.factors = {f.key: self._factor(f) for f in self.placement.held_by(rank)}
        a_keys = [one.a.key for one in dims]
        g_keys = [None if one.g is None else one.g.key for one in dims]
        self.capture = Capture(
            model, self.layers, a_keys, g_keys, config.approximation, config.token_stride, self._like.dtype
        )
        self.capture.take_g = config.fisher == "empirical"
        # The sampled Fisher's gradients come in a pass of their own, after the one that counts as the last.
        self.statistics = Statistics(
            self.capture,
            self.placement,
            self.factors,
            rank,
            self._like,
            max(1, int(config.bucket_mb * 1e6 / (2 if config.wire_dtype == "bfloat16" else 4))),
            torch.bfloat16 if config.wire_dtype == "bfloat16" else self._like.dtype,
            config.overlap and config.fisher != "sampled",
            config.accumulate == "owner",
        )
        pairs = list(zip(a_keys, g_keys, strict=True))
        self.refresh = Refresh(
            self.placement, self.factors, pairs, rank, self._like, config.damping_mode, config.async_delay
        )
        self._pairs = [
            LayerPair(layer, self.factors[a], None if g is None else self.factors[g])
            for layer, (a, g) in zip(self.layers, pairs, strict=True)
            if rank in self.placement.appliers[layer.name]
        ]
        groups: dict[int, list[LayerPair]] = {}
        for pair in self._pairs:
            groups.setdefault(id(pair.a), []).append(pair)
        self._groups = list(groups.values())
        every = self.placement.factors
        self._measured = Stagger({k: f.measure_cost(1024) for k, f in every.items()}, config.stagger)
        self._factorized = Stagger({k: f.refresh_cost for k, f in every.items()}, config.stagger)
        self._steps = self._passes = 0
        self._retry = False
        self._started = False
        self._loaded: Mapping[str, Tensor] = {}
        self._matrices = {n for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1}

    def rules(self) -> dict[str, Rule]:
        """SGD with momentum for the layers, the base method for the rest; biases and norms are not decayed."""
        return self.config.rules(self.owners, self.rest, self._matrices)

    @abstractmethod
    def _factor(self, dims: FactorDims) -> Factor:
        """A factor that this rank keeps, with nothing in it; called by the constructor."""

    @abstractmethod
    def _apply(self, pairs: Sequence[LayerPair], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates of layers that have one A, flattened, by parameter name; zero while a factorization is missing.

        Args:
            pairs: the layers.
            gradients: flattened, by parameter name.
        """

    # -- a window -----------------------------------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Decide what the window's passes measure: all factors at first and after a loss, else those that are due."""
        self._retry = retry or not self._started
        self._passes = 0
        every = list(self.placement.factors)
        self.statistics.open(
            every if self._retry else self._measured.due(self.config.factor_interval, step), step
        )

    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """Set the scale of the output gradients to come and count the loss terms behind them."""
        # A pass on sampled labels belongs to the micro-batch before it.
        if self.capture.take_a:
            if self._passes:
                self.statistics.next_pass()
            self._passes += 1
        self.capture.scale = scale
        self.capture.last = last
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
        """True in windows of the sampled Fisher that measure a G."""
        return self.config.fisher == "sampled" and any(
            key in self.capture.sums for key in self.capture.g_keys
        )

    def measured_badly(self) -> Tensor | None:
        """Whether any sum of the window is not finite on this rank; None when nothing was measured."""
        return self.statistics.measured_badly()

    def update(self, step: int, bad: Tensor | None) -> None:
        """Reduce the window's sums to their owners, average, and factorize what is due."""
        self._steps = step + 1
        if bad is not None:
            self.statistics.average(bad, self.config.ema_decay)
        every = list(self.placement.factors)
        due = every if self._retry else self._factorized.due(self.config.inverse_interval, step)
        self.refresh.run(
            due, step, value(self.config.damping, step) * self.damping_factor, self.config.damping_floor
        )
        self._started = True
        self._retry = False

    # -- the update ---------------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Updates of the layers that this rank applies; zero for a layer without usable factors."""
        updates: dict[str, Tensor] = {}
        for pairs in self._groups:
            updates |= self._apply(pairs, gradients)
        return updates, self._figures(gradients)

    def _figures(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Of the layers that this rank is the first owner of: how many wait, failed, and have no usable pair."""
        counted = [pair for pair in self._pairs if self.owners[pair.layer.weight] == self.rank]
        waiting = missing = self._like
        if counted:
            lacks = ~torch.stack([pair.ready() for pair in counted])
            sizes = torch._foreach_norm(
                [gradients[name] for pair in counted for name in pair.layer.parameters], torch.inf
            )
            ends = list(accumulate(len(pair.layer.parameters) for pair in counted))
            moved = torch.stack([torch.stack(sizes[i:j]).sum() for i, j in pairwise([0, *ends])]) != 0
            waiting, missing = (lacks & moved).sum(), lacks.sum()
        return torch.stack([waiting.to(self._like.dtype), self.refresh.failed, missing.to(self._like.dtype)])

    # -- state --------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Damping, and the age of this rank's factors."""
        return {
            "damping": self.refresh.damping,
            "factor_age": float(self.refresh.age(self._steps - 1)),
        }

    def state_bytes(self) -> int:
        """Bytes of factors and factorizations on this rank."""
        tensors = [tensor for factor in self.factors.values() for tensor in factor.state().values()]
        return sum(t.numel() * t.element_size() for t in [*tensors, *self.refresh.state_tensors().values()])

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of the factors that this rank is the first owner of, and of its factorizations under way."""
        kept: dict[str, Tensor] = {}
        for key, factor in self.factors.items():
            if self.placement.factor_owners[key][0] == self.rank:
                kept |= factor.state()
        return kept | self.refresh.state_tensors()

    def wants(self, name: str) -> bool:
        """Whether this rank keeps the factor that a tensor belongs to."""
        layer, side = name.split("/")[:2]
        return f"{layer}/{side}" in self.factors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the factors that this rank keeps; ages come with `load_counters`."""
        for factor in self.factors.values():
            take_over(
                factor.state(),
                tensors,
                "was it written with another model, low_rank, block_side or share_inputs?",
            )
        self._loaded = tensors

    def counters(self) -> dict[str, Any]:
        """Host-side state: `common`, the same on every rank, and `owned`, by factor, known to its owners only."""
        common, owned = self.refresh.counters()
        return {"common": {**common, "steps": self._steps, "started": self._started}, "owned": owned}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned, `owned` of all ranks together."""
        common = counters["common"]
        self._steps, self._started = int(common["steps"]), bool(common["started"])
        self.refresh.load(common, counters["owned"], self._loaded)
        self._loaded = {}

    def close(self) -> None:
        """Take the hooks off the model."""
        self.statistics.close()
        self.refresh.close()
