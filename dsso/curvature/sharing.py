"""Which layers read the very same tensor, so that one input factor serves all of them.

Query, key and value of an attention, gate and up of a gated feed-forward, and in an encoder-decoder the keys and
values of all cross-attentions. They are found by running the model once on a small input, without gradients, and
comparing the tensors themselves: no name is looked at. In a measured step the layers are compared again.

With dropout between the tensor and the layers (`lora_dropout`) each layer reads a tensor of its own in training;
their factors differ then by the dropout noise, and are shared only when that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsso.curvature.layers import KroneckerLayer

Identity = tuple[int, int, tuple[int, ...], torch.dtype]


def identity(x: Tensor) -> Identity:
    """Equal for tensors on the same memory with the same shape, as long as they are alive."""
    return x.untyped_storage()._cdata, int(x.storage_offset()), tuple(x.shape), x.dtype


def example_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """A small input that a Hugging Face model names itself; None for other models."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or getattr(model, "main_input_name", None) != "input_ids":
        return None
    device = next(model.parameters()).device
    ids = (torch.arange(8, device=device) % max(vocabulary - 4, 1) + 3).clamp(max=vocabulary - 1).view(1, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def leaders(
    model: nn.Module,
    layers: Sequence[KroneckerLayer],
    inputs: Mapping[str, Any] | None,
    through_dropout: bool = False,
) -> tuple[int, ...]:
    """For each layer the first layer, in the order of the model, that reads the same tensor.

    Args:
        model: the unwrapped model, weights whole, on any device (`meta` too).
        layers: those to be measured.
        inputs: keyword arguments of a small forward pass; None: nothing is shared.
        through_dropout: layers that are apart by nothing but dropout share as well.

    Returns:
        Indices of layers; a layer that shares with none has its own. A layer that is used more than once in the
        pass, or with another mask or bias than its leader, shares with none.
    """
    own = tuple(range(len(layers)))
    if inputs is None or len(layers) < 2:
        return own
    kept: list[Tensor] = []  # alive until all are compared: memory must not be used twice
    read: dict[int, list[Identity]] = {}

    def note(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], _out: Any) -> None:
            kept.append(args[0])
            read.setdefault(index, []).append(identity(args[0]))

        return hook

    handles = [layer.module.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    if not through_dropout:
        handles += [
            module.register_forward_hook(lambda _m, _a, out: out.clone())
            for module in model.modules()
            if isinstance(module, nn.Dropout) and module.p > 0
        ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    first: dict[Any, int] = {}
    found = list(own)
    for index, seen in sorted(read.items()):
        if len(seen) == 1:
            layer = layers[index]
            found[index] = first.setdefault((seen[0], layer.side, layer.bias is not None), index)
    return tuple(found)
