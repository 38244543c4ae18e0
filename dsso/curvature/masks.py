"""Which tokens of a micro-batch are real: padding must not enter the input statistics.

The masks are read off the model's own arguments by a hook on the root module, so any training loop serves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsso.curvature.layers import Side

IGNORED_LABEL = -100


class TokenMasks:
    """The padding masks of the micro-batch that is under way.

    `attention_mask` is the encoder's (or a decoder-only model's); the decoder's is `decoder_attention_mask`, or,
    where only labels are given, the positions whose label counts. A model called without a mask has no padding.

    Args:
        model: the unwrapped model.

    Attributes:
        passes: forward passes so far.
        ids, ids_mask: token ids of the micro-batch, [B, S], and their padding mask; None where there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks: dict[Side, Tensor | None] = {"encoder": None, "decoder": None, "cross": None}
        self._labels: Tensor | None = None
        self.passes = 0
        self.ids: Tensor | None = None
        self.ids_mask: Tensor | None = None
        config = getattr(model, "config", None)
        # A decoder-only model predicts label i + 1 at position i: the first label is no term.
        architectures = " ".join(getattr(config, "architectures", None) or [type(model).__name__])
        self._shifted = "CausalLM" in architectures or "LMHead" in architectures
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        encoder = kwargs.get("attention_mask")
        decoder = kwargs.get("decoder_attention_mask")
        labels = kwargs.get("labels")
        if decoder is None and labels is not None and labels.dim() == 2:
            decoder = labels != IGNORED_LABEL
        self._masks = {"encoder": encoder, "decoder": decoder, "cross": encoder}
        self._labels = labels
        self.passes += 1
        ids = kwargs.get("input_ids")
        self.ids = ids if ids is not None and ids.dim() == 2 else None
        fits = encoder is not None and self.ids is not None and encoder.shape == self.ids.shape
        self.ids_mask = encoder if fits else None

    def rows(self, side: Side, x: Tensor) -> Tensor | None:
        """Mask of one layer's input, or None where every row counts.

        Shapes:
            x: [B, S, I] (other shapes have no padding), result: [B, S].
        """
        mask = self._masks[side]
        if mask is None or x.dim() != 3 or mask.dim() != 2 or mask.shape != x.shape[:2]:
            return None
        return mask

    def terms(self) -> Tensor | int | None:
        """Loss terms of the micro-batch, from the labels given to the model; None where it got none."""
        if self._labels is None:
            return None
        if self._labels.dim() < 2:
            return self._labels.numel()
        labels = self._labels[:, 1:] if self._shifted else self._labels
        return (labels != IGNORED_LABEL).sum()

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
