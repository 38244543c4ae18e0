"""One layer's Kronecker block at its owner: averaged factors, damped Cholesky factors, the preconditioned gradient.

Legend of shape suffixes: `I` inputs (+1 for a bias), `O` outputs.

A block never raises and never synchronizes: a factorization that fails leaves the last good factors and says so in
a flag, which the method reads a step later and answers with a new attempt in fp64 and with jitter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsso.curvature.layers import KroneckerLayer
from dsso.linalg import kron
from dsso.linalg.kron import DampingMode
from dsso.optim._statistics import WindowSums

JITTERS = (1e-6, 1e-4, 1e-2)
"""Relative jitter of the attempts, in fp64, after a factorization failed."""


class Block:
    """State of one owned layer.

    Args:
        layer: the layer.
        measure_g: False where G is the identity.
        like: gives dtype and device.

    Attributes:
        ready: the Cholesky factors belong to a usable pair, boolean scalar tensor.
        attempt: next entry of `JITTERS` after a failure.
    """

    def __init__(self, layer: KroneckerLayer, measure_g: bool, like: Tensor) -> None:
        self.layer = layer
        self.a_II = like.new_zeros(layer.side_a, layer.side_a)
        self.a_weight = like.new_zeros(())
        self.g_OO = like.new_zeros(layer.outputs, layer.outputs) if measure_g else None
        self.g_weight = like.new_zeros(())
        self.chol_a_II = torch.eye(layer.side_a, dtype=like.dtype, device=like.device)
        self.chol_g_OO = torch.eye(layer.outputs, dtype=like.dtype, device=like.device) if measure_g else None
        self.ready = torch.zeros((), dtype=torch.bool, device=like.device)
        self.attempt = 0

    def average(self, sums: WindowSums, bad: Tensor, decay: float) -> None:
        """S <- decay S + sum and N <- decay N + count, in place; nothing where `bad`.

        Args:
            sums: of the window; overwritten.
            bad: boolean scalar tensor.
            decay: of the debiased average S/N.
        """
        # A layer that no rank used in this window keeps what it has.
        drop = bad | (sums.a_count <= 0)
        keep = torch.where(drop, 1.0, decay)
        self.a_II.mul_(keep).add_(sums.a_II.masked_fill_(drop, 0.0))
        self.a_weight.mul_(keep).add_(sums.a_count.masked_fill(drop, 0.0))
        if self.g_OO is not None and sums.g_OO is not None:
            self.g_OO.mul_(keep).add_(sums.g_OO.masked_fill_(drop, 0.0))
            self.g_weight.mul_(keep).add_(sums.terms.masked_fill(drop, 0.0))

    def _mean(self, factor_DD: Tensor, weight: Tensor) -> Tensor:
        return kron.mean_eigenvalue(factor_DD) / weight.clamp_min(kron.TINY)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of A and G, scalar tensors."""
        mean_a = self._mean(self.a_II, self.a_weight)
        if self.g_OO is None:
            return mean_a, torch.ones_like(mean_a)
        return mean_a, self._mean(self.g_OO, self.g_weight)

    def factorize(
        self,
        damping: float,
        mode: DampingMode,
        floor: Tensor,
        jitter: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Factorize both factors; where that fails the last good ones stay.

        Args:
            damping: c or lambda, see `dsso.linalg.kron.split_damping`.
            mode: of the damping.
            floor: least curvature, scalar tensor.
            jitter: relative, on top of the damping.
            dtype: to factorize in; None for that of the state.

        Returns:
            Whether a usable pair failed, a boolean scalar tensor.
        """
        own = self.a_II.dtype
        mean_a, mean_g = self.means()
        split = kron.split_damping(mean_a, mean_g, damping, mode, floor)
        chol_a_II, failed = self._cholesky(self.a_II, self.a_weight, split.lambda_a, jitter, dtype or own)
        good = split.usable & ~failed
        chol_g_OO = None
        if self.g_OO is not None:
            chol_g_OO, failed_g = self._cholesky(
                self.g_OO, self.g_weight, split.lambda_g, jitter, dtype or own
            )
            failed, good = failed | failed_g, good & ~failed_g
        self.chol_a_II = torch.where(good, chol_a_II.to(own), self.chol_a_II)
        if chol_g_OO is not None and self.chol_g_OO is not None:
            self.chol_g_OO = torch.where(good, chol_g_OO.to(own), self.chol_g_OO)
        self.ready = self.ready | good
        return split.usable & failed

    @staticmethod
    def _cholesky(
        factor_DD: Tensor, weight: Tensor, shift: Tensor, jitter: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        average_DD = factor_DD.to(dtype) / weight.to(dtype).clamp_min(kron.TINY)
        return kron.cholesky(average_DD, shift, jitter)

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """U = G^-1 M A^-1 as flattened parameters; zero while there are no usable factors.

        Returns:
            Updates by parameter name, and whether there is a gradient but no usable factors (boolean scalar).
        """
        layer = self.layer
        m_OI = self._matrix(gradients)
        u_OI = kron.solve(m_OI, self.chol_g_OO, self.chol_a_II)
        u_OI = torch.where(self.ready, u_OI, torch.zeros_like(u_OI))
        w_OI = u_OI[:, : layer.inputs]
        updates = {layer.weight: (w_OI.mT if layer.transposed else w_OI).reshape(-1)}
        if layer.bias is not None:
            updates[layer.bias] = u_OI[:, layer.inputs].reshape(-1)
        return updates, ~self.ready & (m_OI != 0).any()

    def _matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The layer's gradient, [outputs, inputs (+1)]."""
        layer, flat = self.layer, gradients[self.layer.weight]
        if layer.transposed:
            m_OI = flat.view(layer.inputs, layer.outputs).mT
        else:
            m_OI = flat.view(layer.outputs, layer.inputs)
        if layer.bias is None:
            return m_OI
        return torch.cat([m_OI, gradients[layer.bias].view(-1, 1)], dim=1)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the block, by a name that starts with the layer's."""
        name = self.layer.name
        out = {
            f"{name}/a": self.a_II,
            f"{name}/a_weight": self.a_weight,
            f"{name}/chol_a": self.chol_a_II,
            f"{name}/ready": self.ready,
        }
        if self.g_OO is not None and self.chol_g_OO is not None:
            out |= {
                f"{name}/g": self.g_OO,
                f"{name}/g_weight": self.g_weight,
                f"{name}/chol_g": self.chol_g_OO,
            }
        return out
