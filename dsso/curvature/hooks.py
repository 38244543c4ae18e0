"""Measure the Kronecker statistics of layers while the model runs.

Legend of shape suffixes: `B` examples, `S` tokens, `N` rows (B S, or B), `I` inputs (+1 for a bias), `O` outputs.

For each factor that is due in an accumulation window, summed in place:

    A_sum = sum_n m_n [x_n; 1][x_n; 1]^T    with its count  sum_n m_n     (m: padding mask)
    G_sum = sum_n (s g_n)(s g_n)^T          with its count  sum of loss terms

`g` is what autograd hands to the layer's output: the gradient of `loss_sum / terms`, divided by the accumulation
steps and multiplied by the loss scale. `s = terms * steps / loss_scale` undoes all three, so that G is on the scale
of one loss term and does not depend on how the batch was split. `expand` takes each token for an example; `reduce`
takes the mean of a sequence's inputs and the sum of its output gradients (Eschenhagen et al. 2023, sections 3.2-3.3).

A is taken together with G in the backward pass, by an autograd node put on the layer's output that *saves* the
layer's input. The input is saved by the layer itself anyway, so this costs no memory; under either kind of
activation checkpointing the node is passed exactly once, however often the forward pass is repeated, and the saved
input is the recomputed one. Layers that read the same tensor have one A, which the first of them measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dsso.curvature import sampling
from dsso.curvature.layers import KroneckerLayer
from dsso.curvature.masks import TokenMasks
from dsso.curvature.sharing import Identity, identity
from dsso.curvature.sums import FactorSum
from dsso.errors import RunError
from dsso.phases import phased

Approximation = Literal["expand", "reduce"]


class Absorbs(Protocol):
    """What takes in the uses of layers."""

    def absorb(self, index: int, x: Any, g: Any, mask: Tensor | None) -> None:
        """Take in one use of a layer: its input, its output gradient and the padding mask, as far as asked for."""


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands the layer's input and output gradient to whoever absorbs them."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor | None,
        mask: Tensor | None,
        capture: Absorbs,
        index: int,
        take_g: bool,
    ) -> Tensor:
        """The output as it is; the input is saved where it is wanted."""
        ctx.with_input = x is not None
        if x is not None:
            ctx.save_for_backward(x)
        ctx.mask, ctx.capture, ctx.index, ctx.take_g = mask, capture, index, take_g
        # A fresh tensor on the same memory: unlike a view it may be edited in place by the model, and unlike
        # a clone it costs nothing. The linear layer itself does not keep its output.
        alias = out.new_empty(0)
        return alias.set_(out.untyped_storage(), out.storage_offset(), out.size(), out.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient as it is, once it has been absorbed."""
        x = ctx.saved_tensors[0] if ctx.with_input else None
        ctx.capture.absorb(ctx.index, x, grads[0] if ctx.take_g else None, ctx.mask)
        return grads[0], None, None, None, None, None


class Capture:
    """Hooks on the layers, and the sums of the current window.

    Args:
        model: the unwrapped model (its root forward shows the padding masks).
        layers: the layers to measure.
        a_keys, g_keys: names of each layer's factors; layers that read the same tensor name the same A, and a G
            that is the identity is None.
        approximation: `expand` or `reduce`.
        stride: measure every k-th token only (`expand`).
        dtype: of the statistics.

    Attributes:
        take_a, take_g: what the backward passes to come contribute (the sampled Fisher takes A from the real pass
            and G from its own).
        scale: `s` above, a float or a scalar tensor; the engine sets it before each backward pass.
        masks: the padding masks of the micro-batch under way.
        on_final: called with a factor's name when the last micro-batch's backward pass is through with it.
        last: the backward pass to come is the window's last.
        final_in_each_pass: `on_final` is called in every pass, not only in the last.
        terms: loss terms behind the window's G sums; the engine adds each micro-batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[KroneckerLayer],
        a_keys: Sequence[str],
        g_keys: Sequence[str | None],
        approximation: Approximation = "expand",
        stride: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        self.layers = tuple(layers)
        self.a_keys, self.g_keys = tuple(a_keys), tuple(g_keys)
        self.approximation = approximation
        self.stride = stride
        self.take_a = self.take_g = True
        self.scale: float | Tensor = 1.0
        self.terms: float | Tensor = 0.0
        self.sums: dict[str, FactorSum] = {}
        self.masks = TokenMasks(model)
        self.on_final: Callable[[str], None] | None = None
        self.last = self.final_in_each_pass = False
        self._step = 0
        self._expected: Counter[str] = Counter()
        self._shared = {key for key in self.a_keys if self.a_keys.count(key) > 1}
        # For each shared A: who measures it in this pass, and what that layer read.
        self._leads: dict[str, tuple[int, Identity]] = {}
        self._phases: dict[Any, Tensor] = {}
        self._pass = -1
        self._handles = [
            layer.module.register_forward_hook(self._hook(index)) for index, layer in enumerate(self.layers)
        ]

    @property
    def active(self) -> bool:
        """Something is measured in this window."""
        return bool(self.sums)

    def open(self, sums: Mapping[str, FactorSum], step: int) -> None:
        """Start a window that measures these factors."""
        self.sums = dict(sums)
        self.terms = 0.0
        self._step = step
        self._expected.clear()

    def close(self) -> None:
        """End the window; its memory is given back."""
        self.sums = {}
        self.terms = 0.0
        self._leads.clear()
        self._phases.clear()

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.masks.remove()

    # -- forward ------------------------------------------------------------------------------------------------

    def _hook(self, index: int) -> Any:
        a_key, g_key = self.a_keys[index], self.g_keys[index]

        def tap(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if not self.sums:
                return None
            x = args[0]
            if self._pass != self.masks.passes:
                self._leads.clear()
                self._pass = self.masks.passes
            take_a = self.take_a and a_key in self.sums and self._measures(index, a_key, x)
            take_g = self.take_g and g_key is not None and g_key in self.sums
            if not (take_a or take_g):
                return None
            # Within a backward pass this is the second forward pass of activation checkpointing.
            if torch._C._current_graph_task_id() == -1:
                self._expected.update([a_key] * take_a + ([g_key] if take_g and g_key else []))
            if not torch.is_grad_enabled():
                return None
            if not out.requires_grad:
                if self.take_a:
                    return None
                # A sampled pass freezes the parameters: a layer with nothing trainable before it starts the graph.
                out.requires_grad_(True)
            mask = self.masks.rows(self.layers[index].side, x)
            tapped: Tensor = Tap.apply(  # type: ignore[no-untyped-call]
                out, x.detach() if take_a else None, mask, self, index, take_g
            )
            return tapped

        return tap

    def _measures(self, index: int, key: str, x: Tensor) -> bool:
        """Whether this layer is the one that measures its A; the others must read the same tensor."""
        if key not in self._shared:
            return True
        found = identity(x)
        leader, read = self._leads.setdefault(key, (index, found))
        if leader == index:
            self._leads[key] = (index, found)
            return True
        if read != found:
            raise RunError(
                "two layers no longer read the same tensor, so they cannot share a factor",
                where=f"{self.layers[leader].name} and {self.layers[index].name}",
                remedy='set optimizer.params.share_inputs to "off"',
            )
        return False

    # -- backward -----------------------------------------------------------------------------------------------

    @phased("capture")
    @torch.no_grad()
    def absorb(self, index: int, x: Tensor | None, g: Tensor | None, mask: Tensor | None) -> None:
        """Add one use of a layer to the window's sums.

        Shapes:
            x: [..., I] or None. g: [..., O] or None. mask: [B, S] or None.
        """
        given = x if x is not None else g
        assert given is not None
        # Autograd may run this inside the model's autocast region; statistics keep their precision.
        with torch.autocast(device_type=given.device.type, enabled=False):
            weight, boost = mask, 1.0
            if self.stride > 1 and given.dim() == 3 and self.approximation == "expand":
                # Of G only the k-th part of the sum is seen, of A also the k-th part of the count.
                boost = float(self.stride) ** 0.5
                where, weight = sampling.choose(self._phase(given, mask), mask, given.shape[1], self.stride)
                x = None if x is None else sampling.take(x, where)
                g = None if g is None else sampling.take(g, where) * weight.unsqueeze(-1)
            if x is not None:
                self._add_inputs(index, x, weight)
            if g is not None:
                self._add_gradients(index, g, boost)
        for key in (
            self.a_keys[index] if x is not None else None,
            self.g_keys[index] if g is not None else None,
        ):
            if key is not None:
                # Uses of all the window's forward passes that no backward pass has reached yet. A forward pass
                # without a backward pass leaves some over: the factor is then sent at the end of the window.
                self._expected[key] -= 1
                due = (self.last or self.final_in_each_pass) and not self._expected[key]
                if due and self.on_final is not None:
                    self.on_final(key)

    def _phase(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """Phases of the examples of this pass; without token ids all examples have that of the step."""
        ids = self.masks.ids
        known = (self.masks.passes, given.shape[0], given.device)
        if known not in self._phases:
            self._phases.clear()
            if ids is None or ids.shape[0] != given.shape[0]:
                ids = torch.zeros(given.shape[0], 1, dtype=torch.int64, device=given.device)
                mask = None
            else:
                mask = self.masks.ids_mask
            self._phases[known] = sampling.phases(ids, mask, self._step, self.stride)
        return self._phases[known]

    def _add_inputs(self, index: int, x: Tensor, weight: Tensor | None) -> None:
        layer, dtype = self.layers[index], self._dtype
        if self.approximation == "reduce" and x.dim() == 3:
            if weight is None:
                x_NI, weight_N = x.mean(1, dtype=dtype), None
            else:
                m_BS = weight.to(dtype)
                total = (x.to(dtype) * m_BS.unsqueeze(-1)).sum(1)
                x_NI = total / m_BS.sum(1, keepdim=True).clamp_min(1.0)
                weight_N = (m_BS.amax(1) > 0).to(dtype)
        else:
            x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
            weight_N = None if weight is None else weight.reshape(-1).to(dtype)
        if layer.bias is not None:
            x_NI = torch.cat([x_NI, x_NI.new_ones(x_NI.shape[0], 1)], 1)
        # A masked row is multiplied by zero, not dropped: dropping would ask the device for a shape.
        if weight_N is not None:
            x_NI = x_NI * weight_N.unsqueeze(1)
        self.sums[self.a_keys[index]].add(x_NI, float(x_NI.shape[0]) if weight_N is None else weight_N.sum())

    def _add_gradients(self, index: int, g: Tensor, boost: float) -> None:
        key = self.g_keys[index]
        assert key is not None
        if self.approximation == "reduce" and g.dim() == 3:
            g_NO = g.sum(1, dtype=self._dtype)
        else:
            g_NO = g.reshape(-1, g.shape[-1]).to(self._dtype)
        # Its count is the window's terms; here uses are counted, to know of a layer that was not used.
        if isinstance(self.scale, Tensor):
            self.sums[key].add(g_NO * (self.scale * boost), 1.0)
        else:
            self.sums[key].add(g_NO, 1.0, (self.scale * boost) ** 2)
