"""The window's Kronecker sums on their way to the owners: packed triangles and counts, one buffer an owner.

Legend of shape suffixes: `I` inputs (+1 for a bias), `O` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsso.curvature.hooks import Capture
from dsso.curvature.layers import KroneckerLayer
from dsso.linalg import kron
from dsso.parallel import collectives
from dsso.parallel.placement import Placement


class WindowSums(NamedTuple):
    """Sums and counts of one layer over the global batch.

    Attributes:
        a_II: sum for A. a_count: rows in it. g_OO: sum for G, or None. terms: loss terms in it.
    """

    a_II: Tensor
    a_count: Tensor
    g_OO: Tensor | None
    terms: Tensor


def window_sums(
    capture: Capture, placement: Placement, rank: int, like: Tensor
) -> list[tuple[int, WindowSums | None]]:
    """The sums of the layers that `rank` owns, over all ranks; collective.

    Args:
        capture: what this rank measured, of all layers.
        placement: owners.
        rank: this rank.
        like: gives dtype and device.

    Returns:
        Pairs of layer index and sums, in model order; in a single process None for a layer that was not used, over
        several ranks its count is zero.
    """
    terms = torch.as_tensor(capture.terms, dtype=like.dtype, device=like.device).reshape(1)
    owned = [i for i, layer in enumerate(capture.layers) if placement.owner[layer.name] == rank]
    if not collectives.is_distributed():
        found = [(index, capture.sums(index)) for index in owned]
        return [(i, None if s is None else WindowSums(s.a_II, s.a_count, s.g_OO, terms[0])) for i, s in found]
    pieces = []
    for owner in range(placement.world_size):
        theirs = [i for i, layer in enumerate(capture.layers) if placement.owner[layer.name] == owner]
        pieces.append(torch.cat([part for i in theirs for part in _packed(capture, i, like)] + [terms]))
    got = collectives.reduce_to_owners(pieces, [piece.numel() for piece in pieces], like)
    return _unpacked(got, capture.layers, owned, capture.measure_g)


def _packed(capture: Capture, index: int, like: Tensor) -> list[Tensor]:
    """Packed triangle of A, its count and packed triangle of G; zeros for a layer that was not used."""
    sums, layer = capture.sums(index), capture.layers[index]
    if sums is None:
        size_g = kron.packed_size(layer.outputs) if capture.measure_g else 0
        return [like.new_zeros(kron.packed_size(layer.side_a) + 1 + size_g)]
    parts = [kron.pack(sums.a_II), sums.a_count.reshape(1)]
    if sums.g_OO is not None:
        parts.append(kron.pack(sums.g_OO))
    return parts


def _unpacked(
    got: Tensor, layers: Sequence[KroneckerLayer], owned: Sequence[int], measured: bool
) -> list[tuple[int, WindowSums | None]]:
    out: list[tuple[int, WindowSums | None]] = []
    at = 0
    for index in owned:
        layer = layers[index]
        sizes = [kron.packed_size(layer.side_a), 1, kron.packed_size(layer.outputs) if measured else 0]
        packed_a, count, packed_g = torch.split(got.narrow(0, at, sum(sizes)), sizes)
        at += sum(sizes)
        g_OO = kron.unpack(packed_g, layer.outputs) if measured else None
        out.append((index, WindowSums(kron.unpack(packed_a, layer.side_a), count[0], g_OO, got[-1])))
    return out
