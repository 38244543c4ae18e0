"""What a factor of EKFAC takes: its sum, its eigenvectors, and the layers' second moments along them."""

from __future__ import annotations

from dsso.parallel.placement import FactorDims, LayerDims
from dsso.plan.factors import KroneckerPlan

EIGH = 9.0
"""Operations of a symmetric eigendecomposition with vectors, times D^3 (Golub and Van Loan, section 8.3)."""


class EkfacPlan(KroneckerPlan):
    """EKFAC on one model and one number of ranks; arguments as of `KroneckerPlan`."""

    def factor_bytes(self, factor: FactorDims) -> int:
        """Sum and eigenvectors, diagonal, eigenvalues, the shift, and count and flag."""
        return 4 + 1 + 4 * sum(2 * d * d + 2 * d + 1 for d in factor.blocks)

    def layer_bytes(self, layer: LayerDims) -> int:
        """Second moments and their count."""
        assert layer.g is not None
        return 4 * (layer.a.side * layer.g.side + 1)

    def fresh_bytes(self, factor: FactorDims) -> int:
        """Eigenvectors, eigenvalues and the shift."""
        return 4 * self.made_elements(factor)

    def refresh_bytes(self, factor: FactorDims) -> int:
        """A copy of the sum; in float64 another, the eigenvectors and as much again to work in."""
        return max(4 * d * d + 8 * 4 * d * d for d in factor.blocks)

    def made_elements(self, factor: FactorDims) -> int:
        """Numbers of eigenvectors, eigenvalues, shift and flag on the wire."""
        return 1 + sum(d * d + d + 1 for d in factor.blocks)

    def factorize_flops(self, factor: FactorDims) -> float:
        """Operations of the eigendecompositions, which are made in float64."""
        return sum(EIGH * d**3 for d in factor.blocks)

    def layer_flops(self, layer: LayerDims, outputs: int) -> float:
        """Operations of the turns to the eigenbasis and back."""
        assert layer.g is not None
        wide = 4.0 * outputs * sum(d * d for d in layer.a.blocks)
        return wide + 4.0 * layer.a.side * sum(d * d for d in layer.g.blocks)
