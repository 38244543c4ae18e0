"""Preconditioning one layer's gradient with its pair of factors.

Legend of shape suffixes: `I` inputs (+1 for a bias), `O` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsso.curvature.layers import KroneckerLayer
from dsso.optim._factor import Factor


@dataclass(frozen=True)
class LayerPair:
    """A layer and the factors that precondition it.

    Attributes:
        layer: the layer.
        a: factor of its inputs, maybe shared with other layers.
        g: factor of its output gradients; None where it is the identity.
    """

    layer: KroneckerLayer
    a: Factor
    g: Factor | None

    def ready(self) -> Tensor:
        """Both factors have a usable factorization, a boolean scalar tensor."""
        return self.a.ready if self.g is None else self.a.ready & self.g.ready

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """U = G^-1 M A^-1 as flattened parameters; zero while a factorization is missing.

        Returns:
            Updates by parameter name, and whether there is a gradient but no usable pair (boolean scalar tensor).
        """
        layer, ready = self.layer, self.ready()
        m_OI = self._matrix(gradients)
        u_OI = m_OI if self.g is None else self.g.solve(m_OI)
        u_OI = self.a.solve(u_OI.mT).mT
        u_OI = torch.where(ready, u_OI, torch.zeros_like(u_OI))
        w_OI = u_OI[:, : layer.inputs]
        updates = {layer.weight: (w_OI.mT if layer.transposed else w_OI).reshape(-1)}
        if layer.bias is not None:
            updates[layer.bias] = u_OI[:, layer.inputs].reshape(-1)
        return updates, ~ready & (m_OI != 0).any()

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
