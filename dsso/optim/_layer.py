"""Preconditioning layers' gradients with their pairs of factors.

Legend of shape suffixes: `I` inputs (+1 for a bias), `O` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The layer's gradient, [outputs, inputs (+1)]."""
        layer, flat = self.layer, gradients[self.layer.weight]
        if layer.transposed:
            m_OI = flat.view(layer.inputs, layer.outputs).mT
        else:
            m_OI = flat.view(layer.outputs, layer.inputs)
        if layer.bias is None:
            return m_OI
        return torch.cat([m_OI, gradients[layer.bias].view(-1, 1)], dim=1)

    def flattened(self, u_OI: Tensor) -> dict[str, Tensor]:
        """A matrix of the layer's shape as flattened parameters, by name."""
        layer = self.layer
        w_OI = u_OI[:, : layer.inputs]
        out = {layer.weight: (w_OI.mT if layer.transposed else w_OI).reshape(-1)}
        if layer.bias is not None:
            out[layer.bias] = u_OI[:, layer.inputs].reshape(-1)
        return out


def precondition(pairs: Sequence[LayerPair], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """U = G^-1 M A^-1 of layers that have one A; zero while a factorization is missing.

    A is read once for all of them: with the few rows of an adapter, reading it is what a solve costs.

    Args:
        pairs: layers with the same `a`.
        gradients: flattened, by parameter name.

    Returns:
        Flattened updates by parameter name.
    """
    matrices = [pair.matrix(gradients) for pair in pairs]
    half = [
        m_OI if pair.g is None else pair.g.solve(m_OI) for pair, m_OI in zip(pairs, matrices, strict=True)
    ]
    v_IO = torch.cat(half).mT if len(half) > 1 else half[0].mT
    parts = torch.split(pairs[0].a.solve(v_IO).mT, [m_OI.shape[0] for m_OI in matrices])
    updates: dict[str, Tensor] = {}
    for pair, u_OI in zip(pairs, parts, strict=True):
        # Without a usable pair the factorizations are those of the identity, so this multiplies no NaN by zero.
        updates |= pair.flattened(u_OI * pair.ready())
    return updates
