"""Measure the Kronecker statistics of layers while the model runs.

Legend of shape suffixes: `B` examples, `S` tokens, `N` rows (B S, or B), `I` inputs, `O` outputs.

For each layer and accumulation window, summed in place:

    A_sum = sum_n m_n [x_n; 1][x_n; 1]^T    with its count  sum_n m_n     (m: padding mask)
    G_sum = sum_n (s g_n)(s g_n)^T          with its count  sum of loss terms

`g` is what autograd hands to the layer's output: the gradient of `loss_sum / terms`, divided by the accumulation
steps and multiplied by the loss scale. `s = terms * steps / loss_scale` undoes all three, so that G is on the scale
of one loss term and does not depend on how the batch was split. `expand` takes each token for an example; `reduce`
takes the mean of a sequence's inputs and the sum of its output gradients (Eschenhagen et al. 2023, sections 3.2-3.3).

A is taken together with G in the backward pass, by an autograd node put on the layer's output that *saves* the
layer's input. The input is saved by the layer itself anyway, so this costs no memory; under either kind of
activation checkpointing the node is passed exactly once, however often the forward pass is repeated, and the saved
input is the recomputed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsso.curvature.layers import KroneckerLayer
from dsso.curvature.masks import TokenMasks

Approximation = Literal["expand", "reduce"]


@dataclass
class LayerSums:
    """What one window has gathered of one layer, on this rank.

    Attributes:
        a_II: sum of outer products of inputs, [side_a, side_a]; the bias is the last row and column.
        a_count: number of rows in it, scalar tensor.
        g_OO: sum of outer products of output gradients on the scale of one loss term; None where G is not measured.
            Its count is the window's number of loss terms, `Capture.terms`, whether or not the layer was used.
    """

    a_II: Tensor
    a_count: Tensor
    g_OO: Tensor | None


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that hands the layer's input and output gradient to the capture."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, mask: Tensor | None, capture: Capture, index: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mask, ctx.capture, ctx.index = mask, capture, index
        # A fresh tensor on the same memory: unlike a view it may be edited in place by the model, and unlike
        # a clone it costs nothing. The linear layer itself does not keep its output.
        alias = out.new_empty(0)
        return alias.set_(out.untyped_storage(), out.storage_offset(), out.size(), out.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.capture.absorb(ctx.index, x, grads[0], ctx.mask)
        return grads[0], None, None, None, None


class Capture:
    """Hooks on the layers, and the sums of the current window.

    Args:
        model: the unwrapped model (its root forward shows the padding masks).
        layers: the layers to measure.
        approximation: `expand` or `reduce`.
        measure_g: False for the forward-only Fisher, whose G is the identity.
        dtype: of the statistics.

    Attributes:
        active: collect in the passes to come; constant within an accumulation window.
        take_a, take_g: what the backward passes to come contribute (the sampled Fisher takes A from the real pass
            and G from its own).
        scale: `s` above, a float or a scalar tensor; the engine sets it before each backward pass.
        masks: the padding masks of the micro-batch under way.
        terms: loss terms behind the window's G sums; the engine adds each micro-batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[KroneckerLayer],
        approximation: Approximation = "expand",
        measure_g: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        self.layers = tuple(layers)
        self.approximation = approximation
        self.measure_g = measure_g
        self.active = False
        self.take_a = True
        self.take_g = measure_g
        self.scale: float | Tensor = 1.0
        self.terms: float | Tensor = 0.0
        self._sums: dict[int, LayerSums] = {}
        self.masks = TokenMasks(model)
        self._handles = [
            layer.module.register_forward_hook(self._hook(index, layer))
            for index, layer in enumerate(self.layers)
        ]

    def _hook(self, index: int, layer: KroneckerLayer) -> Any:
        def tap(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if not (self.active and torch.is_grad_enabled()):
                return None
            if not out.requires_grad:
                if self.take_a:
                    return None
                # A sampled pass freezes the parameters: a layer with nothing trainable before it starts the graph.
                out.requires_grad_(True)
            x = args[0]
            mask = self.masks.rows(layer.side, x)
            tapped: Tensor = _Tap.apply(out, x.detach(), mask, self, index)  # type: ignore[no-untyped-call]
            return tapped

        return tap

    def sums(self, index: int) -> LayerSums | None:
        """The window's sums of one layer; None where the layer was not used."""
        return self._sums.get(index)

    def reset(self) -> None:
        """Forget the window (its memory is given back)."""
        self._sums.clear()
        self.terms = 0.0

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.masks.remove()

    def _rows(self, x: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs [N, I], output gradients [N, O] and mask [N] as the approximation wants them."""
        if self.approximation == "reduce" and x.dim() == 3:
            g_NO = g.sum(1, dtype=self._dtype)
            if mask is None:
                return x.mean(1, dtype=self._dtype), g_NO, None
            m_BS = mask.to(self._dtype)
            total = (x.to(self._dtype) * m_BS.unsqueeze(-1)).sum(1)
            return total / m_BS.sum(1, keepdim=True).clamp_min(1.0), g_NO, (m_BS.amax(1) > 0).to(self._dtype)
        x_NI = x.reshape(-1, x.shape[-1]).to(self._dtype)
        g_NO = g.reshape(-1, g.shape[-1]).to(self._dtype)
        return x_NI, g_NO, None if mask is None else mask.reshape(-1).to(self._dtype)

    @torch.no_grad()
    def absorb(self, index: int, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        """Add one use of a layer to the window's sums.

        Shapes:
            x: [..., I]. g: [..., O]. mask: [B, S] or None.
        """
        layer = self.layers[index]
        # Autograd may run this inside the model's autocast region; statistics keep their precision.
        with torch.autocast(device_type=x.device.type, enabled=False):
            x_NI, g_NO, mask_N = self._rows(x, g, mask)
            sums = self._sums.get(index)
            if sums is None:
                sums = self._sums[index] = self._zeros(layer, x.device)
            if self.take_a:
                self._add_inputs(layer, sums, x_NI, mask_N)
            if self.take_g and sums.g_OO is not None:
                scaled_NO = g_NO * self.scale
                sums.g_OO.addmm_(scaled_NO.mT, scaled_NO)

    def _zeros(self, layer: KroneckerLayer, device: torch.device) -> LayerSums:
        return LayerSums(
            a_II=torch.zeros(layer.side_a, layer.side_a, dtype=self._dtype, device=device),
            a_count=torch.zeros((), dtype=self._dtype, device=device),
            g_OO=torch.zeros(layer.outputs, layer.outputs, dtype=self._dtype, device=device)
            if self.measure_g
            else None,
        )

    @staticmethod
    def _add_inputs(layer: KroneckerLayer, sums: LayerSums, x_NI: Tensor, mask_N: Tensor | None) -> None:
        # A masked row is multiplied by zero, not dropped: dropping would ask the device for a shape.
        kept_NI = x_NI if mask_N is None else x_NI * mask_N.unsqueeze(1)
        inputs = layer.inputs
        sums.a_II[:inputs, :inputs].addmm_(kept_NI.mT, kept_NI)
        count = float(x_NI.shape[0]) if mask_N is None else mask_N.sum()
        sums.a_count += count
        if layer.bias is not None:
            total_I = kept_NI.sum(0)
            sums.a_II[inputs, :inputs] += total_I
            sums.a_II[:inputs, inputs] += total_I
            sums.a_II[inputs, inputs] += count
