"""Which layers a Kronecker method can take, and why the other parameters are left to the base method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Side = Literal["encoder", "decoder", "cross"]
"""Whose tokens a layer reads: the encoder's, the decoder's, or (keys and values of cross-attention) the encoder's
inside the decoder."""

_CROSS_ATTENTION = {
    "EncDecAttention",
    "encoder_attn",
    "crossattention",
    "cross_attn",
    "encoder_decoder_attention",
}
_KEY_VALUE = {"k", "v", "key", "value", "k_proj", "v_proj", "key_proj", "value_proj", "kv_proj"}


@dataclass(frozen=True)
class KroneckerLayer:
    """A linear map whose weight (and bias) is preconditioned by Kronecker factors.

    Attributes:
        name: module path in the model; also the name in checkpoints.
        module: the layer.
        inputs, outputs: its width; the factor A has one more row where there is a bias.
        weight, bias: parameter names; bias is None where there is none or it is frozen.
        transposed: weights are stored [inputs, outputs] (Hugging Face `Conv1D`).
        side: whose padding mask applies.
    """

    name: str
    module: nn.Module = field(repr=False)
    inputs: int
    outputs: int
    weight: str
    bias: str | None
    transposed: bool
    side: Side

    @property
    def side_a(self) -> int:
        """Side of A: inputs, plus one for a bias."""
        return self.inputs + (self.bias is not None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the layer's block covers."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Split:
    """The trainable parameters, split between the Kronecker method and the base method.

    Attributes:
        layers: what the Kronecker method takes, in model order.
        rest: parameter name to the reason why the base method takes it.
    """

    layers: tuple[KroneckerLayer, ...]
    rest: dict[str, str]


def _dims(module: nn.Module) -> tuple[int, int, bool] | None:
    """(inputs, outputs, transposed) of a linear layer, from attributes: under ZeRO-3 weights have no shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    # Hugging Face's Conv1D (GPT-2 style) is known by name, so that this file need not import transformers.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nx), int(module.nf), True  # type: ignore[arg-type]
    return None


def _side(name: str, encoder_decoder: bool) -> Side:
    if not encoder_decoder:
        return "encoder"
    parts = name.split(".")
    if "decoder" not in parts:
        return "encoder"
    if _CROSS_ATTENTION & set(parts) and _KEY_VALUE & set(parts):
        return "cross"
    return "decoder"


def split_parameters(model: nn.Module, exclude: Sequence[str] = (), max_side: int = 16384) -> Split:
    """Find the layers that a Kronecker method can take.

    Taken are `nn.Linear` and Hugging Face `Conv1D` with a trainable weight that is used by one module only. Left to
    the base method, with the reason: norms, embeddings, convolutions, tied weights, the output head over the
    vocabulary, sides above `max_side`, and whatever `exclude` matches.

    Args:
        model: the unwrapped model, its `requires_grad` flags set.
        exclude: regular expressions searched in module paths.
        max_side: largest side of a factor; a dense side d costs 4 d^2 bytes twice.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    head = output_head(model)
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    patterns = [re.compile(pattern) for pattern in exclude]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: list[KroneckerLayer] = []
    taken: set[str] = set()
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        dims = _dims(module)
        weight = getattr(module, "weight", None)
        own = {names[id(p)]: p for p in module.parameters(recurse=False) if p.requires_grad}
        if dims is None or weight is None or not weight.requires_grad:
            kind = type(module).__name__
            reason = (
                f"bias of a frozen weight ({kind})" if dims is not None else f"not a linear layer ({kind})"
            )
            for name in own:
                reasons.setdefault(name, reason)
            continue
        inputs, outputs, transposed = dims
        if users[id(weight)] > 1:
            reason = "weight tied between modules"
        elif module is head:
            reason = "output head over the vocabulary"
        elif any(pattern.search(path) for pattern in patterns):
            reason = "excluded by the recipe"
        elif max(inputs, outputs) > max_side:
            reason = f"side {max(inputs, outputs)} above max_side {max_side}"
        else:
            bias = getattr(module, "bias", None)
            trainable_bias = bias is not None and bias.requires_grad and users[id(bias)] == 1
            layers.append(
                KroneckerLayer(
                    name=path,
                    module=module,
                    inputs=inputs,
                    outputs=outputs,
                    weight=names[id(weight)],
                    bias=names[id(bias)] if trainable_bias else None,
                    transposed=transposed,
                    side=_side(path, encoder_decoder),
                )
            )
            taken.update(layers[-1].parameters)
            continue
        for name in own:
            reasons[name] = reason
    rest = {
        name: reasons.get(name, "not part of a linear layer")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in taken
    }
    return Split(tuple(layers), rest)


def output_head(model: nn.Module) -> nn.Module | None:
    """The projection to the vocabulary, where the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        head = getter()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None
