"""Which modules of a model FSDP2 gathers as a unit: the repeated blocks, found without knowing the model.

A transformer keeps its blocks in one `nn.ModuleList` (two, for an encoder and a decoder), and they hold most of its
parameters. What is left, embeddings and heads and whatever is shared between modules, belongs to the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

SMALLEST_SHARE = 0.1
"""A list of blocks with a smaller share of the largest list's parameters is left to the root."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in model order; none where the model has no list of them.

    Taken are the elements of the outermost lists of modules of one class. A block that shares a parameter with a
    module outside of it (a tied weight) is left to the root, in which alone shared parameters can live.

    Args:
        model: adapters added.
    """
    lists: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        if len({type(block) for block in module}) == 1:
            lists.append(module)
            inside.update(id(inner) for inner in module.modules())
    sizes = [sum(p.numel() for p in one.parameters()) for one in lists]
    largest = max(sizes, default=0)
    users = _users(model)
    found = {
        id(block): block
        for one, size in zip(lists, sizes, strict=True)
        if size and size >= SMALLEST_SHARE * largest
        for block in one
        if any(True for _ in block.parameters())
        and all(users[key] == count for key, count in _users(block).items())
    }
    return list(found.values())


def _users(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its identity."""
    return Counter(id(p) for inner in module.modules() for p in inner.parameters(recurse=False))


def reduce_unused(unit: Any, units: Collection[nn.Module]) -> None:
    """Have a unit reduce all its trainable parameters, also those that a rank's loss did not reach.

    FSDP2 reduces the gradients that a rank has, and ranks that have other ones would wait for each other. Versions of
    torch that cannot reduce zeros by themselves get them in the unit's backward pass.

    Args:
        unit: sharded already.
        units: all units of the model.
    """
    if hasattr(unit, "set_reduce_scatter_unused_params"):
        unit.set_reduce_scatter_unused_params(True, recurse=False)
        return
    nested = {id(m) for other in units if other is not unit and _within(other, unit) for m in other.modules()}
    own = [module for module in unit.modules() if id(module) not in nested]

    def fill(_gradient: Tensor) -> None:
        for module in own:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def hook(_unit: nn.Module, _args: Any, output: Any) -> None:
        # Behind FSDP's own hook on the same tensors: the weights are gathered when it runs.
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(fill)  # type: ignore[no-untyped-call]

    unit.register_forward_hook(hook)


def _within(inner: nn.Module, outer: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())
