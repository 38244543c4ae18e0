"""What a plan has to know of a model: parameters, linear layers, layers with a common input; no weight is needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dsso.curvature.layers import Side, split_parameters
from dsso.engines.units import blocks
from dsso.errors import RecipeError
from dsso.optim._elementwise import ElementwiseConfig, choose
from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim._kronecker_layout import layer_dims
from dsso.optim._matrix import take
from dsso.optim._matrix_config import MatrixConfig


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: in the model; a tied one has the first of its names.
        shape: whole.
        trained: it asks for a gradient.
        unit: index of the block that FSDP2 gathers it with, -1 for the root.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    unit: int

    @property
    def numel(self) -> int:
        """Elements."""
        out = 1
        for size in self.shape:
            out *= size
        return out


@dataclass(frozen=True)
class Linear:
    """One use of a linear layer's weight, for counting operations.

    Attributes:
        size: elements of the weight.
        side: whose tokens it reads.
        trained: its weight asks for a gradient.
    """

    size: int
    side: Side
    trained: bool


@dataclass(frozen=True)
class KfacLayer:
    """One layer for K-FAC.

    Attributes:
        name: module path.
        parameters: weight, and bias where there is a trained one.
        a_key: name of its input factor, that of another layer where the input is common.
        side_a, side_g: of its factors.
        side: whose tokens it reads.
    """

    name: str
    parameters: tuple[str, ...]
    a_key: str
    side_a: int
    side_g: int
    side: Side


@dataclass(frozen=True)
class Survey:
    """A model, as a plan sees it.

    Attributes:
        weights: every parameter once, in model order.
        linears: every linear layer.
        layers: those that K-FAC takes; empty for a baseline.
        matrices: whole shapes of the parameters that a method on blocks takes; empty for others.
        rest: the other trained parameters, with the reason why the base method takes them.
        buffer_bytes: of the model's buffers.
        encoder_decoder: inputs and targets are read by different layers.
        checkpointing: activations are recomputed in the backward pass.
        notes: what the user should know.
        kept_whole: bytes of matrices that every rank keeps whole while a step is solved for.
        classes: scores of a loss term, of a model that classifies.
    """

    weights: tuple[Weight, ...]
    linears: tuple[Linear, ...]
    layers: tuple[KfacLayer, ...]
    rest: Mapping[str, str]
    buffer_bytes: int
    encoder_decoder: bool
    checkpointing: bool
    notes: tuple[str, ...] = ()
    matrices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept_whole: int = 0
    classes: int = 1

    @property
    def trained(self) -> list[Weight]:
        """Parameters that ask for a gradient."""
        return [weight for weight in self.weights if weight.trained]

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(weight.numel for weight in self.weights)

    def tokens(self, examples: int, source: int, target: int) -> dict[str, int]:
        """Tokens of some examples at full length that layers read, by side.

        Args:
            examples: their number.
            source: longest input.
            target: longest output.
        """
        read = examples * source
        return {
            "encoder": read,
            "cross": read,
            "decoder": examples * target if self.encoder_decoder else read,
        }


class _Full(TorchFunctionMode):
    """Answers questions about values that a meta tensor does not have.

    The mask code of transformers asks whether a batch has padding, or several sequences packed into one, before it
    drops the mask. The input that is made up here is one full sequence.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def survey(model: nn.Module, config: Any, example: Mapping[str, Any] | None = None) -> Survey:
    """Look at a model, which may be on the meta device; its `requires_grad` flags and its dtype count.

    Args:
        model: the unwrapped model, adapters added.
        config: `optimizer_config` of the recipe; what a method on gradients takes is looked for where it is its own.
        example: keyword arguments of a small forward pass on the model's device; None: made up for a Hugging Face
            model.

    Raises:
        RecipeError: nothing is trained, or nothing that the method could take.
    """
    units = {id(p): index for index, block in enumerate(blocks(model)) for p in block.parameters()}
    weights = tuple(
        Weight(name, tuple(p.shape), p.requires_grad, units.get(id(p), -1))
        for name, p in model.named_parameters()
    )
    if not any(weight.trained for weight in weights):
        raise RecipeError("no parameter of the model is trainable", where="dsso.peft")
    settings = getattr(model, "config", None)
    layers, rest, notes = (
        _layers(model, config, example) if isinstance(config, KroneckerConfig) else ((), {}, ())
    )
    matrices: Mapping[str, tuple[int, ...]] = {}
    kept_whole = 0
    if isinstance(config, MatrixConfig):
        chosen = take(model, config)
        matrices, rest = chosen.shapes, chosen.rest
    if isinstance(config, ElementwiseConfig):
        elementwise = choose(model, config.exclude, "the method")
        rest, kept_whole = elementwise.rest, config.whole_bytes(model, elementwise.taken)
    return Survey(
        weights,
        _linears(model),
        layers,
        rest,
        sum(b.numel() * b.element_size() for b in model.buffers()),
        bool(getattr(settings, "is_encoder_decoder", False)),
        any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        notes,
        matrices,
        kept_whole,
        int(getattr(settings, "num_labels", 1)),
    )


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    """Every linear layer with the tokens that it reads; frozen ones are found by thawing them for the search."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(True)
        sides = {layer.module: layer.side for layer in split_parameters(model, (), 2**62).layers}
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    found = []
    decoder: Side = "decoder" if "decoder" in sides.values() else "encoder"
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            assert isinstance(weight, nn.Parameter)
            # Not among the layers found: heads and tied weights, which are at the end of a model.
            found.append(Linear(weight.numel(), sides.get(module, decoder), weight.requires_grad))
    return tuple(found)


def _layers(
    model: nn.Module, config: KroneckerConfig, example: Mapping[str, Any] | None
) -> tuple[tuple[KfacLayer, ...], Mapping[str, str], tuple[str, ...]]:
    split = split_parameters(model, config.exclude, config.max_side)
    if not split.layers:
        raise RecipeError(
            f"the model has no layer for {config.title}",
            where="optimizer.type",
            got=", ".join(sorted(set(split.rest.values()))[:6]),
            allowed="trainable nn.Linear or Conv1D layers",
            remedy="train linear layers (LoRA, adapters, a prefix with projection, all weights) or use AdamW",
        )
    with warnings.catch_warnings(record=True) as caught, _Full():
        warnings.simplefilter("always")
        dims = layer_dims(config, model, split.layers, example)
    notes = tuple(str(one.message) for one in caught if "are shared" in str(one.message))
    layers = tuple(
        KfacLayer(layer.name, layer.parameters, one.a.key, layer.side_a, layer.outputs, layer.side)
        for layer, one in zip(split.layers, dims, strict=True)
    )
    return layers, split.rest, notes
