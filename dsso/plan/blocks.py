"""What a method on blocks of matrices keeps, sends and computes, from the shapes of the parameters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsso.optim import resolve
from dsso.optim._matrix import MatrixLayout
from dsso.optim._matrix_config import MatrixConfig
from dsso.plan.exchange import Exchange, exchanges
from dsso.plan.model import Survey
from dsso.plan.report import Window


class MatrixPlan:
    """A method on blocks, on one model and one number of ranks; the face of `dsso.plan.factors.KroneckerPlan`.

    Args:
        survey: the model.
        kind: `optimizer.type`.
        config: parameters of the method.
        world_size: number of ranks.
    """

    parts = "blocks"
    strategy = ""
    sent_in_pass = False
    all_until: int | None = None
    statistics_wire = bases_wire = factorizations_wire = 0

    def __init__(self, survey: Survey, kind: str, config: MatrixConfig, world_size: int) -> None:
        self.config = config
        self.survey = survey
        self.world_size = world_size
        block: Any = resolve(kind).Method.block
        self.layout = MatrixLayout(survey.matrices, config, block, world_size)
        self.owners = self.layout.owners

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.layout.costs)

    def _totals(self, rank: int) -> tuple[int, float, float]:
        """Elements, refresh and step of a rank."""
        costs = [self.layout.costs[block.key] for block in self.layout.held_by(rank)]
        return (
            sum(one.elements for one in costs),
            sum(one.refresh for one in costs),
            sum(one.step for one in costs),
        )

    def state_bytes(self, rank: int) -> int:
        """Bytes of the blocks on a rank."""
        return 4 * self._totals(rank)[0]

    def answers(self, rank: int) -> int:
        """Bytes of products with curvature that a rank keeps for its blocks until they are refreshed."""
        if self.config.products_of_curvature is None:
            return 0
        return 4 * sum(self._numel(name) for name, owner in self.owners.items() if owner == rank)

    @property
    def largest_unit(self) -> int:
        """Bytes of the blocks of one parameter, at most: they are on one rank."""
        costs = self.layout.costs
        return max(4 * sum(costs[b.key].elements for b in blocks) for blocks in self.layout.blocks.values())

    def first_window(self, rank: int) -> Window:
        """A refresh works on a few copies of a block's largest square, and every step on one of its parameter."""
        blocks = self.layout.held_by(rank)
        square = max((max(block.sides) ** 2 for block in blocks), default=0)
        widest = max((self._numel(block.name) for block in blocks), default=0)
        return Window(refresh=4 * (5 * square + widest))

    later_window = first_window

    def _numel(self, name: str) -> int:
        out = 1
        for side in self.survey.matrices[name]:
            out *= side
        return out

    def exchange(self, held: Sequence[Mapping[str, int]]) -> list[Exchange]:
        """Gradients to the owners and updates back; see `dsso.plan.exchange.exchanges`."""
        sizes = {weight.name: weight.numel for weight in self.survey.trained}
        return exchanges({name: (owner,) for name, owner in self.owners.items()}, sizes, held)

    @property
    def often(self) -> tuple[float, float]:
        """Measurements and refreshes of everything that fall on a step in the long run."""
        return 0.0, self.config.refresh_interval.often

    def measure_flops(self, rows: Mapping[str, int]) -> float:
        """Nothing is measured."""
        return 0.0

    @property
    def refresh_flops(self) -> list[float]:
        """Operations of each rank when all blocks are refreshed once."""
        return [2 * self._totals(rank)[1] for rank in range(self.world_size)]

    @property
    def apply_flops(self) -> float:
        """Operations of the busiest rank in a step without a refresh."""
        return max(2 * self._totals(rank)[2] for rank in range(self.world_size))
