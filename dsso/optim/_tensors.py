"""Which parameters a method on matrices takes, and the blocks that they are cut into.

Blocks are cut from the *unsharded* parameter, so no engine and no number of ranks changes a step. A parameter with all
its blocks belongs to one rank; parameters are spread by what their refreshes cost.

Rules: vectors (biases, norms, single rows) go to the base method, and so do embeddings and the output head over the
vocabulary unless they are asked for. Tensors of three or more dimensions, convolutions for instance, have neighbouring
dimensions merged as long as a side stays within the limit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dsso.curvature.layers import output_head

EXCLUDED = "excluded by the recipe"
"""Why a parameter is left out that the recipe says so of."""


@dataclass(frozen=True)
class TensorBlock:
    """A block of a parameter.

    Attributes:
        name: the parameter.
        index: number of the block in it.
        shape: of the parameter as it is looked at, dimensions merged.
        corner: first index in every dimension.
        sides: of the block.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    corner: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def key(self) -> str:
        """Unique, the same in every process and in checkpoints."""
        return f"{self.name}/{self.index}"

    def of(self, flat: Tensor) -> Tensor:
        """The block as a view.

        Args:
            flat: the whole parameter, or something of its size, contiguous.
        """
        view = flat.view(self.shape)
        for dim, (start, side) in enumerate(zip(self.corner, self.sides, strict=True)):
            view = view.narrow(dim, start, side)
        return view


@dataclass(frozen=True)
class Chosen:
    """The trainable parameters, split between the method and the base method.

    Attributes:
        shapes: of those that the method takes, in model order.
        rest: of the others the name, and the reason why the base method takes it.
    """

    shapes: dict[str, tuple[int, ...]]
    rest: dict[str, str]


def choose(model: nn.Module, exclude: Sequence[str], embeddings: bool) -> Chosen:
    """Find the parameters that a method on matrices takes.

    Args:
        model: the unwrapped model, its `requires_grad` flags set; shapes are those before any sharding.
        exclude: regular expressions searched in module paths.
        embeddings: take embeddings and the output head as well.
    """
    vocabulary = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    head = output_head(model)
    heads = set() if head is None else {id(parameter) for parameter in head.parameters(recurse=False)}
    shapes: dict[str, tuple[int, ...]] = {}
    rest: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 a parameter that is not gathered has no shape of its own.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if sum(side > 1 for side in shape) < 2:
            rest[name] = "vector"
        elif id(parameter) in vocabulary and not embeddings:
            rest[name] = "embedding"
        elif id(parameter) in heads and not embeddings:
            rest[name] = "output head over the vocabulary"
        elif excluded(name, exclude):
            rest[name] = EXCLUDED
        else:
            shapes[name] = shape
    return Chosen(shapes, rest)


def excluded(name: str, exclude: Sequence[str]) -> bool:
    """Whether one of the regular expressions is found in the path of a parameter's module."""
    return any(re.search(pattern, name.rpartition(".")[0]) for pattern in exclude)


def merged(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """The shape with dimensions of one dropped and, above two, neighbours merged while their product is within `limit`.

    From the last on, so that of a convolution inputs and kernel go together; at least two are left, a matrix stays one.
    """
    sides = [side for side in shape if side > 1]
    at = len(sides) - 2
    while len(sides) > 2 and at >= 0:
        if sides[at] * sides[at + 1] <= limit:
            sides[at : at + 2] = [sides[at] * sides[at + 1]]
        at -= 1
    return tuple(sides)


def cut(name: str, shape: Sequence[int], limit: int) -> Iterator[TensorBlock]:
    """Blocks of a parameter: every side above `limit` is cut into as few, as even parts as possible.

    Args:
        name: of the parameter.
        shape: of it, unsharded.
        limit: longest side of a block.
    """
    sides = merged(shape, limit)
    parts = [_parts(side, limit) for side in sides]
    for index, chosen in enumerate(itertools.product(*parts)):
        corner = tuple(start for start, _ in chosen)
        yield TensorBlock(name, index, sides, corner, tuple(side for _, side in chosen))


def _parts(side: int, limit: int) -> list[tuple[int, int]]:
    count = math.ceil(side / limit)
    small, more = divmod(side, count)
    sizes = [small + (index < more) for index in range(count)]
    return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))


def blocks_of(shapes: Mapping[str, Sequence[int]], limit: int) -> dict[str, tuple[TensorBlock, ...]]:
    """Blocks of every parameter, in their order."""
    return {name: tuple(cut(name, shape, limit)) for name, shape in shapes.items()}
