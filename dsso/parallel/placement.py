"""Which rank owns which layer's Kronecker factors: a pure function of costs.

An owner keeps both factors of a layer, factorizes them and preconditions its gradient. Ownership does not follow
the optimizer's partition: a partition is even in elements, factorization costs grow with the cube of the sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dsso.linalg.kron import packed_size


@dataclass(frozen=True)
class LayerDims:
    """Sides of one layer's factors.

    Attributes:
        name: unique name.
        inputs: side of A, one more than the layer's inputs where it has a bias.
        outputs: side of G; 0 where G is the identity (forward-only Fisher).
    """

    name: str
    inputs: int
    outputs: int

    @property
    def cost(self) -> float:
        """Arithmetic of one refresh: two factorizations, d^3/3 multiply-adds each."""
        return (self.inputs**3 + self.outputs**3) / 3

    @property
    def factor_elements(self) -> int:
        """Elements of A and G stored square."""
        return self.inputs**2 + self.outputs**2


@dataclass(frozen=True)
class Placement:
    """Owners of all layers.

    Attributes:
        world_size: number of ranks.
        layers: in the order of the model; the same on every rank.
        owner: rank of each layer, by name.
    """

    world_size: int
    layers: tuple[LayerDims, ...]
    owner: dict[str, int]

    def owned_by(self, rank: int) -> list[LayerDims]:
        """Layers of one rank, in model order."""
        return [layer for layer in self.layers if self.owner[layer.name] == rank]

    @cached_property
    def costs(self) -> list[float]:
        """Refresh cost of each rank."""
        totals = [0.0] * self.world_size
        for layer in self.layers:
            totals[self.owner[layer.name]] += layer.cost
        return totals

    def factor_bytes(self, rank: int, itemsize: int = 4) -> int:
        """Bytes of one rank's factors and of their Cholesky factors."""
        return sum(2 * layer.factor_elements * itemsize for layer in self.owned_by(rank))

    def wire_elements(self, rank: int) -> int:
        """Elements that a refresh sends to one rank: packed triangles."""
        return sum(packed_size(layer.inputs) + packed_size(layer.outputs) for layer in self.owned_by(rank))


def assign(layers: Sequence[LayerDims], world_size: int) -> Placement:
    """Longest processing time first: the dearest layer goes to the rank with the least work so far.

    Ties are broken by the memory held, then by the rank, so the plan is the same on every rank.

    Raises:
        ValueError: for a world size below one or two layers of one name.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies" (at most 4/3 of the optimum).
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if len({layer.name for layer in layers}) != len(layers):
        raise ValueError("layer names must be unique")
    load = [(0.0, 0, rank) for rank in range(world_size)]
    owner: dict[str, int] = {}
    order = sorted(range(len(layers)), key=lambda i: (-layers[i].cost, i))
    for index in order:
        layer = layers[index]
        cost, held, rank = min(load)
        load[rank] = (cost + layer.cost, held + layer.factor_elements, rank)
        owner[layer.name] = rank
    return Placement(world_size, tuple(layers), {layer.name: owner[layer.name] for layer in layers})
