"""What K-FAC and its kin keep, send and compute, from the sides of factors: nothing is measured, nothing allocated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim._kronecker_layout import factor_dims
from dsso.optim._refresh import Stagger
from dsso.parallel.placement import FactorDims, LayerDims, Placement, Strategy, assign
from dsso.plan.exchange import Exchange, exchanges
from dsso.plan.model import Survey
from dsso.plan.report import Window
from dsso.schedule import Interval

_AHEAD = 4
"""Buckets of statistics under way at a time."""
_NEIGHBOURS = 3
"""Layers whose sums may wait for each other where sums are sent while the backward pass runs: they leave in the order
of the model, and within a block a model may run them in another."""


class KroneckerPlan(ABC):
    """A method with Kronecker factors on one model and one number of ranks; what a factor keeps is the method's.

    Args:
        survey: the model.
        config: parameters of the method.
        world_size: number of ranks.
        gas: micro-batches a window.
        strategy: in the place of the configuration's.
    """

    parts = "Kronecker factors"

    def __init__(
        self,
        survey: Survey,
        config: KroneckerConfig,
        world_size: int,
        gas: int,
        strategy: Strategy | None = None,
    ) -> None:
        self.survey = survey
        self.config = config
        self.world_size = world_size
        # Sums kept over a window of several passes are all there when the last one, which sends them, begins.
        self.rounds = gas if config.accumulate == "owner" else 1
        within = gas == self.rounds
        self.sent_in_pass = config.overlap and config.fisher != "sampled" and world_size > 1 and within
        measured = config.fisher != "forward_only"
        dims = [
            LayerDims(
                layer.name,
                factor_dims(config, layer.a_key, layer.side_a),
                factor_dims(config, f"{layer.name}/g", layer.side_g) if measured else None,
            )
            for layer in survey.layers
        ]
        self.placement: Placement = assign(
            dims, world_size, strategy or config.strategy, config.grad_worker_fraction
        )
        self.strategy = strategy or config.strategy
        self.owners = {n: self.placement.owner[one.name] for one in survey.layers for n in one.parameters}
        every = self.placement.factors
        self._measured = Stagger({k: f.measure_cost(1024) for k, f in every.items()}, config.stagger)
        self._factorized = Stagger({k: f.refresh_cost for k, f in every.items()}, config.stagger)

    @property
    def count(self) -> int:
        """Number of factors."""
        return len(self.placement.factors)

    @property
    def often(self) -> tuple[float, float]:
        """Measurements and factorizations of everything that fall on a step in the long run."""
        return self.config.factor_interval.often, self.config.inverse_interval.often

    # -- what a method says -------------------------------------------------------------------------------------

    @abstractmethod
    def factor_bytes(self, factor: FactorDims) -> int:
        """Bytes of a factor and its factorization where they are kept, counts and flags included."""

    def layer_bytes(self, layer: LayerDims) -> int:
        """Bytes that an applier keeps of a layer besides."""
        return 0

    @abstractmethod
    def fresh_bytes(self, factor: FactorDims) -> int:
        """Bytes of a factorization that is not taken over yet."""

    @abstractmethod
    def refresh_bytes(self, factor: FactorDims) -> int:
        """Bytes of a factorization while it is made, with what it is made from."""

    @abstractmethod
    def made_elements(self, factor: FactorDims) -> int:
        """Numbers of a factorization on the wire."""

    @abstractmethod
    def factorize_flops(self, factor: FactorDims) -> float:
        """Operations of a factorization, as on a GPU."""

    @abstractmethod
    def layer_flops(self, layer: LayerDims, outputs: int) -> float:
        """Operations that bring a layer's gradient to its update.

        Args:
            layer: which.
            outputs: rows of its gradient.
        """

    # -- memory -------------------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {key: self.factor_bytes(f) for key, f in self.placement.factors.items()}

    def state_bytes(self, rank: int) -> int:
        """Bytes of factors, factorizations and what else a layer has, on a rank."""
        layers = [one for one in self.placement.layers if rank in self.placement.appliers[one.name]]
        return sum(self._sizes[f.key] for f in self.placement.held_by(rank)) + sum(
            map(self.layer_bytes, layers)
        )

    @property
    def largest_unit(self) -> int:
        """Bytes of the largest unit of the placement: by so much a rank may hold more than its even share."""
        return max(
            sum(self._sizes[f.key] for f in unit.factors) + sum(map(self.layer_bytes, unit.layers))
            for unit in self.placement.units
        )

    def window(self, rank: int, measured: Collection[str], factorized: Collection[str]) -> Window:
        """Bytes that a step takes besides.

        Args:
            rank: which.
            measured: factors whose statistics are taken.
            factorized: factors that are factorized.
        """
        placement, every = self.placement, self.placement.factors
        owned = {key for key, ranks in placement.factor_owners.items() if rank in ranks}
        sums = self._sums(set(measured))
        buffers = arrived = 0
        if self.world_size > 1 and measured:
            item = 2 if self.config.wire_dtype == "bfloat16" else 4
            arriving = sum(every[key].wire_elements for key in owned & set(measured))
            largest = max(every[key].wire_elements for key in measured)
            capacity = max(1, int(self.config.bucket_mb * 1e6 / item))
            open_ = min((self.world_size + _AHEAD) * capacity, sum(every[k].wire_elements for k in measured))
            # What earlier passes have brought waits beside what comes.
            waiting = 4 * arriving if self.rounds > 1 else 0
            buffers = (
                waiting
                + item * (arriving + open_)
                + 4 * (largest + sum(_basis(every[key]) for key in measured))
            )
            # The buckets that came, the vectors put together from them, and one as a matrix.
            arrived = (item + 4) * arriving + max(
                (_sum_bytes(every[key]) for key in owned & set(measured)), default=0
            )
        mine = [every[key] for key in owned & set(factorized)]
        # At once: one after another. In the background all of them wait.
        waiting = sum(map(self.fresh_bytes, mine)) if self.config.async_delay else 0
        refresh = waiting + max(map(self.refresh_bytes, mine), default=0)
        return Window(sums, buffers, arrived, refresh)

    def _sums(self, measured: set[str]) -> int:
        """Most bytes of sums at one time."""
        every = self.placement.factors
        if not self.sent_in_pass:
            return sum(_sum_bytes(every[key]) for key in measured)
        sizes: list[int] = []
        seen: set[str] = set()
        for layer in self.placement.layers:
            keys = {f.key for f in layer.factors} & measured - seen
            seen |= keys
            sizes.append(sum(_sum_bytes(every[key]) for key in keys))
        return max(sum(sizes[i : i + _NEIGHBOURS]) for i in range(len(sizes)))

    def first_window(self, rank: int) -> Window:
        """Step 0, and a step after a lost one: all factors."""
        return self.window(rank, self.placement.factors, self.placement.factors)

    @property
    def all_until(self) -> int | None:
        """First step from which on a step measures only a part of the factors; None: every measurement is whole."""
        for start, every in self.config.factor_interval.segments:
            if every is None or (every > 1 and self.config.stagger):
                return max(start, 1)
        return None

    def later_window(self, rank: int) -> Window:
        """The largest of each kind among the steps from `all_until` on (from step 1 on where that is None)."""
        start = self.all_until or 1
        measured = self._due(self._measured, self.config.factor_interval, start)
        factorized = self._due(self._factorized, self.config.inverse_interval, start)
        windows = [self.window(rank, keys, ()) for keys in measured]
        most = max(windows, key=lambda window: window.sums + window.buffers)
        # In the background, those of as many steps as they are late are alive together.
        alive = 1 + self.config.async_delay
        refresh = alive * max(self.window(rank, (), keys).refresh for keys in factorized)
        return Window(
            most.sums,
            most.buffers,
            max(window.arrived for window in windows),
            min(refresh, self.window(rank, (), self.placement.factors).refresh),
        )

    @staticmethod
    def _due(stagger: Stagger, interval: Interval, start: int) -> list[list[str]]:
        """What is due on every kind of step from `start` on."""
        found: list[list[str]] = [[]]
        for index, (begin, every) in enumerate(interval.segments):
            ends = interval.segments[index + 1][0] if index + 1 < len(interval.segments) else None
            if every is None or (ends is not None and ends <= start):
                continue
            first = max(begin, start)
            last = first + every if ends is None else min(ends, first + every)
            found += [stagger.due(interval, step) for step in range(first, last)]
        return found

    # -- wire ---------------------------------------------------------------------------------------------------

    @property
    def statistics_wire(self) -> int:
        """Bytes that a rank hands to the reductions when all factors are measured once."""
        if self.world_size == 1:
            return 0
        item = 2 if self.config.wire_dtype == "bfloat16" else 4
        owners = self.placement.factor_owners
        once = sum(item * f.wire_elements * len(owners[key]) for key, f in self.placement.factors.items())
        return self.rounds * once

    @property
    def bases_wire(self) -> int:
        """Bytes of the bases of low-rank forms that are broadcast before all factors are measured once."""
        if self.world_size == 1:
            return 0
        return 4 * sum(_basis(f) for f in self.placement.factors.values())

    @property
    def factorizations_wire(self) -> int:
        """Bytes that the busiest rank sends to other appliers when all factors are factorized once."""
        sent = [0] * self.world_size
        for key, users in self.placement.sources.items():
            size = 4 * self.made_elements(self.placement.factors[key])
            for user, source in users.items():
                sent[source] += size * (user != source)
        return max(sent)

    def exchange(self, held: Sequence[Mapping[str, int]]) -> list[Exchange]:
        """Gradients to the appliers and updates back; see `dsso.plan.exchange.exchanges`."""
        workers = {
            n: self.placement.appliers[layer.name] for layer in self.survey.layers for n in layer.parameters
        }
        return exchanges(workers, {w.name: w.numel for w in self.survey.trained}, held)

    # -- operations ---------------------------------------------------------------------------------------------

    def measure_flops(self, rows: Mapping[str, int]) -> float:
        """Operations of a rank when all factors are measured once.

        Args:
            rows: tokens of a rank and window that a layer of each side reads.
        """
        every, done, total = self.placement.factors, set(), 0.0
        for layer, dims in zip(self.survey.layers, self.placement.layers, strict=True):
            for factor in dims.factors:
                if factor.key not in done:
                    done.add(factor.key)
                    total += 2 * every[factor.key].measure_cost(rows[layer.side])
        return total

    @property
    def refresh_flops(self) -> list[float]:
        """Operations of each rank when all factors are factorized once."""
        totals = [0.0] * self.world_size
        for key, ranks in self.placement.factor_owners.items():
            for rank in ranks:
                totals[rank] += self.factorize_flops(self.placement.factors[key])
        return totals

    @property
    def apply_flops(self) -> float:
        """Operations of the busiest rank to precondition the gradients of one step."""
        work = [0.0] * self.world_size
        for layer in self.placement.layers:
            g_side = layer.a.side if layer.g is None else layer.g.side
            outputs = (
                next(one.side_g for one in self.survey.layers if one.name == layer.name)
                if layer.g is None
                else g_side
            )
            for rank in self.placement.appliers[layer.name]:
                work[rank] += self.layer_flops(layer, outputs)
        return max(work)


def _sum_bytes(factor: FactorDims) -> int:
    ranks = [(d, factor.kept_rank(d)) for d in factor.blocks]
    return 4 + 4 * sum(d * k + 1 if k else d * d for d, k in ranks)


def _basis(factor: FactorDims) -> int:
    return sum(d * factor.kept_rank(d) for d in factor.blocks)
