"""From a model's layers to the description of their factors: sides, blocks, low-rank forms, common inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dsso.curvature import sharing
from dsso.curvature.layers import KroneckerLayer
from dsso.optim._kronecker_config import KroneckerConfig
from dsso.parallel.placement import FactorDims, LayerDims


def layer_dims(
    config: KroneckerConfig,
    model: nn.Module,
    layers: Sequence[KroneckerLayer],
    example: Mapping[str, Any] | None = None,
) -> list[LayerDims]:
    """Factors of every layer.

    Args:
        config: of the method.
        model: the unwrapped model, its weights whole (or on the meta device).
        layers: those that the method takes.
        example: keyword arguments of a small forward pass; None: made up for a Hugging Face model.
    """
    leaders = _leaders(config, model, layers, example)
    measured = config.fisher != "forward_only"
    return [
        LayerDims(
            layer.name,
            factor_dims(config, f"{layers[leader].name}/a", layer.side_a),
            factor_dims(config, f"{layer.name}/g", layer.outputs) if measured else None,
        )
        for layer, leader in zip(layers, leaders, strict=True)
    ]


def factor_dims(config: KroneckerConfig, key: str, side: int) -> FactorDims:
    """Blocks and rank of one factor."""
    count = 1 if config.block_side is None else -(-side // config.block_side)
    small, more = divmod(side, count)
    blocks = tuple(small + (index < more) for index in range(count))
    return FactorDims(key, blocks, config.kept_rank(blocks))


def _leaders(
    config: KroneckerConfig,
    model: nn.Module,
    layers: Sequence[KroneckerLayer],
    example: Mapping[str, Any] | None,
) -> tuple[int, ...]:
    own = tuple(range(len(layers)))
    # With the absolute damping the shift of A depends on the layer's own G.
    if config.share_inputs == "off" or config.damping_mode == "absolute":
        return own
    inputs = example if example is not None else sharing.example_inputs(model)
    try:
        return sharing.leaders(model, layers, inputs, config.share_inputs == "assume")
    except Exception as error:
        # The example was made up: a model that cannot run on it loses some memory, not the run.
        if example is not None:
            raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"no input factors are shared: the model does not run on a made-up input ({words})", stacklevel=2
        )
        return own
