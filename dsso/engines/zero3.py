"""Parameters that ZeRO may have cut: which elements a rank holds at stage 3, and whole weights in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def piece(parameter: Any, rank: int) -> tuple[int, int]:
    """First element and number of elements that a rank holds at stage 3: equal slices, the last ones padded."""
    each, whole = int(parameter.partition_numel()), int(parameter.ds_numel)
    start = min(rank * each, whole)
    return start, min(each, whole - start)


def state_dict(module: nn.Module, trainable_only: bool, rank: int) -> dict[str, Tensor]:
    """Full parameters by name on the CPU of rank 0, empty elsewhere; collective."""
    import deepspeed

    out: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                out[name] = parameter.detach().cpu().clone()
    return out


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite parameters with full ones, the same on every rank; collective."""
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        sharded: Any = parameters[name] if hasattr(parameters[name], "ds_id") else None
        if sharded is not None:
            sharded.all_gather()
        parameters[name].data.copy_(value)
        if sharded is not None:
            sharded.partition(has_been_updated=True)
