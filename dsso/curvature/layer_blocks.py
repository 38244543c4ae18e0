"""Blocks of the Gauss-Newton matrix on its diagonal, one for each small linear layer, formed without approximation.

With p_nc the gradient of example n in a layer's parameters when column c of a root of the losses' curvature d2L/df2 is
pulled back from its scores, summed over the tokens that the layer read,

    G_layer = sum_n sum_c p_nc p_nc^T

takes one backward pass of the batch for each score of a loss term, and one loss term an example: terms of one example
must not meet in one p.

Sources: Martens 2020, section 8, for the matrix; Dangel, Kunstner, Hennig 2020, *BackPACK*, for roots of the losses'
curvature that are pulled back.

Legend of shape suffixes: `B` examples, `N` loss terms, `C` scores of a term, `S` tokens, `I` inputs, `O` outputs, `D`
parameters of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsso.curvature.hooks import Tap
from dsso.curvature.layers import KroneckerLayer, split_parameters
from dsso.curvature.products import Loss, loss_curvature
from dsso.errors import RunError
from dsso.parallel import collectives


def small_layers(model: nn.Module, taken: Collection[str], most: int) -> tuple[KroneckerLayer, ...]:
    """Linear layers with at most so many trained parameters, all of them taken by the method.

    Args:
        model: the unwrapped model; its weights may be sharded or on the meta device.
        taken: names of the parameters that the method takes.
        most: parameters of a layer.
    """
    found = split_parameters(model, (), 2**62).layers
    return tuple(one for one in found if size(one) <= most and all(name in taken for name in one.parameters))


def size(layer: KroneckerLayer) -> int:
    """Trained parameters of a layer, the side of its block."""
    return layer.side_a * layer.outputs


def root_column(loss: Loss, f_NC: Tensor, column: int) -> Tensor:
    """A column of the symmetric root of d2L/df2, for every loss term, [N, C].

    Args:
        loss: of scores, a sum over terms.
        f_NC: the scores.
        column: which one.
    """
    flat_NC = f_NC.detach().reshape(len(f_NC), -1).to(torch.promote_types(f_NC.dtype, torch.float32))
    count = flat_NC.shape[1]
    unit_CC = torch.eye(count, dtype=flat_NC.dtype, device=flat_NC.device)
    shaped = flat_NC.view(f_NC.shape)
    rows = [
        loss_curvature(loss, shaped, unit_C.expand_as(flat_NC).reshape(f_NC.shape)).reshape(flat_NC.shape)
        for unit_C in unit_CC
    ]
    bent_NCC = torch.stack(rows, 1)
    values_NC, vectors_NCC = torch.linalg.eigh((bent_NCC + bent_NCC.mT) / 2)
    # Of a loss that is not convex in its scores the negative part is left out, as in any Gauss-Newton matrix.
    scaled_NCC = vectors_NCC * values_NC.clamp_min(0).sqrt().unsqueeze(1)
    root_NC: Tensor = torch.bmm(scaled_NCC, vectors_NCC[:, column].unsqueeze(2))
    return root_NC.squeeze(2).reshape(f_NC.shape)


class LayerBlocks:
    """Measures the blocks of some layers while the model runs.

    Args:
        model: the unwrapped model.
        layers: the small ones.
        like: gives device and dtype of the blocks.

    Attributes:
        active: the passes to come are measured.
        columns: passes of the batch that a block takes; None until the first of them has seen the scores.
        done: those that have been.
    """

    def __init__(self, model: nn.Module, layers: Sequence[KroneckerLayer], like: Tensor) -> None:
        self.layers = tuple(layers)
        self.active = False
        self.columns: int | None = None
        self.done = 0
        self._like = like
        self._sums: list[Tensor] = []
        self._passes = 0
        self._scale: float | Tensor = 1.0
        self._examples = 0
        self._pulled: dict[int, Tensor] = {}
        self._handles = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        self._handles += [
            one.module.register_forward_hook(self._hook(index)) for index, one in enumerate(self.layers)
        ]

    def open(self) -> None:
        """Begin to measure from zero."""
        self._sums = [self._like.new_zeros(size(one), size(one)) for one in self.layers]
        self._passes = self.done = 0
        self.columns = None

    @property
    def measuring(self) -> bool:
        """Passes are left to be made."""
        return bool(self._sums) and (self.columns is None or self.done < self.columns)

    def before_backward(self, scale: float | Tensor, terms: float | Tensor) -> None:
        """A backward pass of a micro-batch is about to run.

        Args:
            scale: undoes what the loss was divided by, its terms included, and multiplied by.
            terms: of the micro-batch.
        """
        self._absorb_pass()
        self._passes += 1
        self._scale = scale / terms

    def end_window(self) -> None:
        """A pass of the whole batch has been measured."""
        self._absorb_pass()
        self.active = False
        self.done += 1

    def take(self) -> list[Tensor]:
        """The blocks of the mean loss of the batch, of every layer, [D, D]; collective.

        They are the same on all ranks, and kept no longer.
        """
        flat = torch.cat([one.flatten() for one in self._sums] + [self._like.new_full((1,), self._passes)])
        self._sums = []
        total = collectives.all_sum(flat)
        del flat
        share = (self.columns or 1) / total[-1]
        sizes = [size(one) for one in self.layers]
        parts = torch.split(total[:-1], [side * side for side in sizes])
        return [part.view(side, side) * share for part, side in zip(parts, sizes, strict=True)]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    # -- the model's passes ---------------------------------------------------------------------------------------

    def _see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim() > 0]
        self._examples = len(tensors[0]) if tensors else 0

    def _hook(self, index: int) -> Any:
        def tap(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if not self.active or not torch.is_grad_enabled():
                return None
            if len(out) != self._examples:
                raise RunError(
                    "a layer's block cannot be formed: it does not read one row an example",
                    where=self.layers[index].name,
                    got=f"{len(out)} rows of {self._examples} examples",
                    remedy="set optimizer.params.block_parameters to null, or to less than the layer has",
                )
            tapped: Tensor = Tap.apply(out, args[0].detach(), None, self, index, True)  # type: ignore[no-untyped-call]
            return tapped

        return tap

    @torch.no_grad()
    def absorb(self, index: int, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        """Add one use of a layer to its examples' gradients.

        Shapes:
            x: [B, ..., I]. g: [B, ..., O].
        """
        layer, dtype = self.layers[index], self._like.dtype
        with torch.autocast(device_type=g.device.type, enabled=False):
            x_BSI = x.reshape(len(x), -1, x.shape[-1]).to(dtype)
            g_BSO = g.reshape(len(g), -1, g.shape[-1]).to(dtype)
            p = x_BSI.mT @ g_BSO if layer.transposed else g_BSO.mT @ x_BSI
            parts = [p.flatten(1)] + ([g_BSO.sum(1)] if layer.bias is not None else [])
            p_BD = torch.cat(parts, 1) * self._scale
        known = self._pulled.get(index)
        self._pulled[index] = p_BD if known is None else known + p_BD

    def _absorb_pass(self) -> None:
        for index, p_BD in self._pulled.items():
            self._sums[index].addmm_(p_BD.mT, p_BD)
        self._pulled.clear()

    def see_scores(self, f_NC: Tensor) -> None:
        """Learn how many passes the blocks take.

        Args:
            f_NC: scores of the micro-batch whose backward pass comes next.

        Raises:
            RunError: examples do not have one loss term each.
        """
        if len(f_NC) != self._examples:
            raise RunError(
                "blocks need one loss term an example",
                where="optimizer.params.block_parameters",
                got=f"{len(f_NC)} terms of {self._examples} examples",
                remedy="set it to null",
            )
        self.columns = math.prod(f_NC.shape[1:])
