"""The order of the examples, and batches.

The order is a pure function of (number of examples, global batch size, seed, step): it does not depend on
the world size or on the accumulation, and a run that is resumed goes on with the batches that it would have
seen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsso.errors import RecipeError

IGNORE = -100
"""Label of a position without a loss term."""

Encoded = Mapping[str, Any]
"""A tokenized example, as python numbers and lists; what it holds depends on its coder."""


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return tuple(order)


def global_batch(n: int, global_batch: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of one optimizer step.

    The epochs' permutations, one behind the other, are cut into batches; a batch may span two epochs, and no
    example is dropped.

    Args:
        n: number of training examples.
        global_batch: examples per optimizer step, over all ranks and micro-batches.
        seed: seed of the permutations.
        step: optimizer step, from 0.
    """
    if n < 1:
        raise RecipeError("there are no training examples", where="dsso.task")
    indices: list[int] = []
    position = step * global_batch
    while len(indices) < global_batch:
        epoch, offset = divmod(position, n)
        taken = _permutation(n, seed, epoch)[offset : offset + global_batch - len(indices)]
        indices.extend(taken)
        position += len(taken)
    return indices


def micro_batches(indices: Sequence[int], rank: int, world_size: int, gas: int) -> list[list[int]]:
    """The share of one rank, cut into its micro-batches.

    Args:
        indices: indices of the global batch.
        rank: this rank.
        world_size: number of ranks.
        gas: gradient accumulation steps.

    Raises:
        RecipeError: the batch cannot be cut into equal parts.
    """
    size, rest = divmod(len(indices), world_size * gas)
    if rest or size == 0:
        raise RecipeError(
            f"a batch of {len(indices)} examples cannot be cut into {world_size} ranks x {gas} micro-batches",
            where="train_batch_size",
            got=len(indices),
            allowed=f"multiples of {world_size * gas}",
        )
    starts = [(micro * world_size + rank) * size for micro in range(gas)]
    return [list(indices[start : start + size]) for start in starts]


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch. Shapes: B examples, T tokens, N loss terms."""

    inputs: dict[str, Tensor]
    """What the model's forward takes, and nothing else; no labels."""
    labels: Tensor
    """Classes or values `[B]`, or tokens `[B, T]` with -100 where there is no loss term."""
    example_ids: Tensor
    """Indices of the examples in their split, int64 `[B]`; not an input of the model."""
    terms: int
    """Number of loss terms."""
    positions: Tensor | None = None
    """For token labels: where the loss terms are in the flattened labels, int64 `[N]`.

    Made on the host, so that picking them needs no synchronization with the device.
    """

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            labels=move(self.labels),
            example_ids=move(self.example_ids),
            positions=None if self.positions is None else move(self.positions),
        )


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Sequences of different length as one matrix.

    Args:
        sequences: B sequences.
        value: what fills the gaps.
        left: fill on the left (for generation) instead of the right.

    Returns:
        int64 `[B, T]`.
    """
    width = max(len(sequence) for sequence in sequences)
    rows = []
    for sequence in sequences:
        gap = [value] * (width - len(sequence))
        rows.append([*gap, *sequence] if left else [*sequence, *gap])
    return torch.tensor(rows, dtype=torch.int64)


def token_positions(labels: Tensor) -> Tensor:
    """Where a matrix of labels carries loss terms, as indices into its flattened form."""
    return (labels.flatten() != IGNORE).nonzero().flatten()
