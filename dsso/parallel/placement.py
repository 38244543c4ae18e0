"""Which rank keeps, factorizes and applies which Kronecker factors: a pure function of sides and costs.

A factor belongs to the layers that use it: one A serves all layers that read the same tensor. Layers with a common A
are one *unit* and go to one rank together, unless they are too much for it; then the unit is cut and each part keeps
a copy of A. A unit's owner averages and factorizes its factors; its appliers, the owner among them, precondition its
layers' gradients:

- `memory_optimal`: the owner alone. Factors and factorizations cost a rank 1/W of the whole.
- `communication_optimal`: every rank. The factorizations are sent to all, gradients need not travel where every
  rank has them whole.
- `hybrid_optimal`: a fraction of the ranks.

Ownership does not follow the optimizer's partition: a partition is even in elements, factorization costs grow with
the cube of the sides. Factors as small as an adapter's rank cost nothing and follow their layer.

Source: KAISA (Pauloski et al. 2021) for the strategies, in its terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dsso.linalg.triangle import packed_size

Strategy = Literal["memory_optimal", "communication_optimal", "hybrid_optimal"]


@dataclass(frozen=True)
class FactorDims:
    """One Kronecker factor.

    Attributes:
        key: unique name, the same in every process and in checkpoints.
        blocks: sides of the blocks on its diagonal; one block is the whole factor.
        rank: of the low-rank form of every block; 0: dense.
    """

    key: str
    blocks: tuple[int, ...]
    rank: int = 0

    @property
    def side(self) -> int:
        """Rows of the whole factor."""
        return sum(self.blocks)

    def kept_rank(self, side: int) -> int:
        """Rank of the low-rank form of a block of that side; 0: it is dense."""
        return self.rank if 0 < self.rank < side else 0

    @property
    def refresh_cost(self) -> float:
        """Multiply-adds of a factorization: d^3/3, or those of a basis of rank k."""
        return sum(3.0 * d * self.kept_rank(d) ** 2 if self.kept_rank(d) else d**3 / 3 for d in self.blocks)

    def measure_cost(self, rows: int = 1) -> float:
        """Multiply-adds of a measurement of `rows` rows: half of a product, or a sketch."""
        return rows * sum(
            2.0 * d * self.kept_rank(d) if self.kept_rank(d) else d * (d + 1) / 2 for d in self.blocks
        )

    @property
    def elements(self) -> int:
        """Numbers kept by an owner: sum and factorization in one square and a diagonal, or two bases and two cores."""
        return sum(
            2 * d * self.kept_rank(d) + 2 * self.kept_rank(d) ** 2 + 2 if self.kept_rank(d) else d * d + d
            for d in self.blocks
        )

    @property
    def wire_elements(self) -> int:
        """Numbers that a measurement sends to each owner: packed triangles, or sketches and traces."""
        return sum(d * self.kept_rank(d) + 1 if self.kept_rank(d) else packed_size(d) for d in self.blocks)


@dataclass(frozen=True)
class LayerDims:
    """The factors of one layer.

    Attributes:
        name: unique name.
        a: factor of the inputs; layers that read the same tensor name the same factor.
        g: factor of the output gradients; None where it is the identity (forward-only Fisher).
    """

    name: str
    a: FactorDims
    g: FactorDims | None

    @property
    def factors(self) -> tuple[FactorDims, ...]:
        """One or two factors."""
        return (self.a,) if self.g is None else (self.a, self.g)


@dataclass(frozen=True)
class Unit:
    """Layers that are placed together.

    Attributes:
        layers: with a common A.
        ranks: appliers, the owner first.
    """

    layers: tuple[LayerDims, ...]
    ranks: tuple[int, ...] = ()

    @cached_property
    def factors(self) -> tuple[FactorDims, ...]:
        """Every factor once."""
        return tuple({f.key: f for layer in self.layers for f in layer.factors}.values())

    @property
    def cost(self) -> float:
        """Multiply-adds of a refresh."""
        return sum(f.refresh_cost for f in self.factors)

    @property
    def elements(self) -> int:
        """Numbers kept by the owner."""
        return sum(f.elements for f in self.factors)


@dataclass(frozen=True)
class Placement:
    """Who keeps what.

    Attributes:
        world_size: number of ranks.
        layers: in the order of the model; the same on every rank.
        units: all layers, with their ranks.
    """

    world_size: int
    layers: tuple[LayerDims, ...]
    units: tuple[Unit, ...]

    @cached_property
    def appliers(self) -> dict[str, tuple[int, ...]]:
        """Ranks that precondition each layer, its owner first, in the order of the model."""
        found = {layer.name: unit.ranks for unit in self.units for layer in unit.layers}
        return {layer.name: found[layer.name] for layer in self.layers}

    @cached_property
    def owner(self) -> dict[str, int]:
        """Owner of each layer."""
        return {name: ranks[0] for name, ranks in self.appliers.items()}

    @cached_property
    def factors(self) -> dict[str, FactorDims]:
        """Every factor once, by key, in the order of the model."""
        return {f.key: f for layer in self.layers for f in layer.factors}

    @cached_property
    def factor_owners(self) -> dict[str, tuple[int, ...]]:
        """Ranks that average and factorize each factor: one, or one a part of a unit that was cut."""
        owners: dict[str, list[int]] = {key: [] for key in self.factors}
        for unit in self.units:
            for factor in unit.factors:
                if unit.ranks[0] not in owners[factor.key]:
                    owners[factor.key].append(unit.ranks[0])
        return {key: tuple(ranks) for key, ranks in owners.items()}

    @cached_property
    def sources(self) -> dict[str, dict[int, int]]:
        """For each factor, rank that needs its factorization -> rank that makes it (itself, where it owns it)."""
        found: dict[str, dict[int, int]] = {key: {r: r for r in rs} for key, rs in self.factor_owners.items()}
        for unit in self.units:
            for factor in unit.factors:
                for rank in unit.ranks:
                    found[factor.key].setdefault(rank, unit.ranks[0])
        return found

    def owned_by(self, rank: int) -> list[LayerDims]:
        """Layers of one rank, in model order."""
        return [layer for layer in self.layers if self.owner[layer.name] == rank]

    def held_by(self, rank: int) -> list[FactorDims]:
        """Factors that one rank keeps in some form, in model order."""
        return [f for key, f in self.factors.items() if rank in self.sources[key]]

    @cached_property
    def costs(self) -> list[float]:
        """Refresh cost of each rank."""
        totals = [0.0] * self.world_size
        for key, ranks in self.factor_owners.items():
            for rank in ranks:
                totals[rank] += self.factors[key].refresh_cost
        return totals

    def factor_bytes(self, rank: int, itemsize: int = 4) -> int:
        """Bytes of one rank's factors and factorizations."""
        return sum(f.elements * itemsize for f in self.held_by(rank))

    def wire_elements(self, rank: int) -> int:
        """Numbers that a measurement of all factors sends to one rank."""
        return sum(f.wire_elements for key, f in self.factors.items() if rank in self.factor_owners[key])


def assign(
    layers: Sequence[LayerDims],
    world_size: int,
    strategy: Strategy = "memory_optimal",
    fraction: float = 0.5,
) -> Placement:
    """Owners by refresh cost, see `owners_by_cost`, and the appliers that the strategy wants.

    Args:
        layers: in model order.
        world_size: number of ranks.
        strategy: see the module.
        fraction: of the ranks that apply a unit, for `hybrid_optimal`.

    Raises:
        ValueError: for a world size below one, two layers of one name, or one key with two sides.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if len({layer.name for layer in layers}) != len(layers):
        raise ValueError("layer names must be unique")
    seen: dict[str, FactorDims] = {}
    for layer in layers:
        for factor in layer.factors:
            if seen.setdefault(factor.key, factor) != factor:
                raise ValueError(f"factor {factor.key!r} has two descriptions")
    appliers = {"memory_optimal": 1, "communication_optimal": world_size}.get(
        strategy, max(1, round(fraction * world_size))
    )
    units = _units(layers, world_size)
    owners = owners_by_cost([unit.cost for unit in units], [unit.elements for unit in units], world_size)
    placed = [
        Unit(
            unit.layers,
            tuple((owner + step * world_size // appliers) % world_size for step in range(appliers)),
        )
        for unit, owner in zip(units, owners, strict=True)
    ]
    return Placement(world_size, tuple(layers), tuple(placed))


def owners_by_cost(costs: Sequence[float], elements: Sequence[int], world_size: int) -> list[int]:
    """One rank for each job: longest processing time first, within the memory of an even share.

    The dearest job goes to the rank with the least work among those that stay within an even share of the memory plus
    one job. Ties are broken by the memory held, then by the rank, so the result is the same on every rank.

    Args:
        costs: of the jobs.
        elements: numbers that the owner of each has to keep.
        world_size: number of ranks.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    budget = sum(elements) / world_size + max(elements, default=0)
    work, held, owners = [0.0] * world_size, [0] * world_size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        open_ = [r for r in range(world_size) if held[r] + elements[index] <= budget]
        # The rank that holds least is always within the budget but for rounding.
        owner = min(open_ or range(world_size), key=lambda r: (work[r], held[r], r))
        work[owner] += costs[index]
        held[owner] += elements[index]
        owners[index] = owner
    return owners


def _units(layers: Sequence[LayerDims], world_size: int) -> list[Unit]:
    """Layers by their A, in model order; a unit above an even share of the memory is cut."""
    groups: dict[str, list[LayerDims]] = {}
    for layer in layers:
        groups.setdefault(layer.a.key, []).append(layer)
    whole = [Unit(tuple(group)) for group in groups.values()]
    share = sum(unit.elements for unit in whole) / world_size
    units: list[Unit] = []
    for unit in whole:
        parts = 1 if world_size == 1 else min(len(unit.layers), math.ceil(unit.elements / share))
        size = math.ceil(len(unit.layers) / parts)
        units += [Unit(unit.layers[i : i + size]) for i in range(0, len(unit.layers), size)]
    return units


def slots(costs: Sequence[float], count: int) -> list[int]:
    """Spread jobs over `count` steps so that no step has much more work than another.

    Longest processing time first, by cost alone: the slots do not depend on the number of ranks, so that the step
    does not either.

    Returns:
        The slot of every job.
    """
    load = [(0.0, 0, slot) for slot in range(count)]
    out = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, jobs, slot = min(load)
        load[slot] = (total + costs[index], jobs + 1, slot)
        out[index] = slot
    return out
