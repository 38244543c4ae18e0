"""What a factor of K-FAC takes: a square for sum and factorization, or the two bases and cores of a low-rank form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsso.optim.kfac import Config
from dsso.parallel.placement import FactorDims, LayerDims
from dsso.plan.factors import KroneckerPlan


class KfacPlan(KroneckerPlan):
    """K-FAC on one model and one number of ranks; arguments as of `KroneckerPlan`."""

    if TYPE_CHECKING:
        config: Config

    def factor_bytes(self, factor: FactorDims) -> int:
        """Bytes of a factor and its factorization where they are kept, counts and flags included."""
        # Diagonals and low-rank forms are fp32 in any case.
        item, total = 2 if self.config.storage == "bfloat16" else 4, 4 + 1
        for d in factor.blocks:
            k = factor.kept_rank(d)
            # The basis of the average, the one that the inverse was made with; core and inverse; trace and tail.
            total += 4 * (2 * d * k + 2 * k * k + 2) if k else item * d * d + 4 * d
        return total

    def fresh_bytes(self, factor: FactorDims) -> int:
        """Bytes of a factorization that is not taken over yet."""
        return 4 * sum(d * k + k * k + 1 if k else d * d for d, k in _ranks(factor))

    def refresh_bytes(self, factor: FactorDims) -> int:
        """A damped copy and what it is turned into."""
        return 2 * self.fresh_bytes(factor)

    def made_elements(self, factor: FactorDims) -> int:
        """Numbers of a factorization on the wire."""
        return 1 + sum(d * k + k * k + 1 if k else d * (d + 1) // 2 for d, k in _ranks(factor))

    def factorize_flops(self, factor: FactorDims) -> float:
        """Operations of a factorization; dense ones as on a GPU, maybe inverted."""
        times = 3 if self.config.keeps_inverses(on_accelerator=True) else 1
        dense = sum(d**3 / 3 for d, k in _ranks(factor) if not k)
        return 2 * (factor.refresh_cost + (times - 1) * dense)

    def layer_flops(self, layer: LayerDims, outputs: int) -> float:
        """Operations of the two solves."""
        cost = _solve_flops(layer.a, outputs)
        return cost if layer.g is None else cost + _solve_flops(layer.g, layer.a.side)


def _ranks(factor: FactorDims) -> list[tuple[int, int]]:
    """Sides of the blocks and the ranks of their low-rank forms."""
    return [(d, factor.kept_rank(d)) for d in factor.blocks]


def _solve_flops(factor: FactorDims, columns: int) -> float:
    return columns * sum(4.0 * d * k + 2.0 * k * k if k else 2.0 * d * d for d, k in _ranks(factor))
