"""Whole gradients of parameters brought to those who work on them, and updates back: bytes of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """Whole gradients of one rank's parameters, brought to it and back.

    Attributes:
        sent: bytes to other ranks in a step, gradients and updates.
        gathered: those of them that are gradients.
        peak: most bytes of its buffers at one time.
        owned: those of them that stay from the first exchange to the end of the step.
    """

    sent: int
    gathered: int
    peak: int
    owned: int


def exchanges(
    workers: Mapping[str, Sequence[int]], sizes: Mapping[str, int], held: Sequence[Mapping[str, int]]
) -> list[Exchange]:
    """Gradients to the workers and updates back, for every rank.

    Args:
        workers: ranks that work on each parameter, its owner first.
        sizes: elements of every trained parameter.
        held: of every rank, elements of each trained parameter in its optimizer's buffers.
    """
    world = len(held)
    sent, back, packed, owned, counted = ([0] * world for _ in range(5))
    answered, mine = [0] * world, [0] * world
    for name, ranks in workers.items():
        counted[ranks[0]] += sizes[name]
        for worker in ranks:
            owned[worker] += sizes[name]
            if held[worker].get(name) == sizes[name]:
                packed[worker] += sizes[name]
                continue
            for holder in range(world):
                packed[holder] += held[holder].get(name, 0)
                sent[holder] += held[holder].get(name, 0) * (holder != worker)
        for holder in range(world):
            piece = held[holder].get(name, 0)
            worker = holder if holder in ranks else ranks[holder % len(ranks)]
            answered[worker] += piece
            back[worker] += piece * (holder != worker)
            mine[holder] += piece
    out = []
    for r in range(world):
        received = 0 if world == 1 else 1
        gather = packed[r] + (1 + received) * owned[r]
        norms = 2 * owned[r] + 2 * counted[r]
        scatter = 2 * owned[r] + answered[r] + received * mine[r]
        out.append(
            Exchange(4 * (sent[r] + back[r]), 4 * sent[r], 4 * max(gather, norms, scatter), 4 * owned[r])
        )
    return out
