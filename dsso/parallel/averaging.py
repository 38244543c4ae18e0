"""Averaging many tensors over the ranks in a few large messages, and starting all ranks from the same values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dsso.parallel import collectives

BUCKET_NUMEL = 2**25
"""Elements of a message: long enough to fill a link, short enough that the next one is packed meanwhile."""


def cut(sizes: Sequence[int], largest: int) -> list[range]:
    """Neighbours that fit into one bucket; a tensor above the bound has a bucket of its own.

    Args:
        sizes: elements of the tensors.
        largest: elements of a bucket.
    """
    out: list[range] = []
    start = filled = 0
    for index, size in enumerate(sizes):
        if index > start and filled + size > largest:
            out.append(range(start, index))
            start, filled = index, 0
        filled += size
    if start < len(sizes):
        out.append(range(start, len(sizes)))
    return out


@torch.no_grad()
def average(tensors: Sequence[Tensor], largest: int = BUCKET_NUMEL) -> list[Tensor]:
    """Mean over the ranks of each tensor; collective, without host synchronization.

    Args:
        tensors: of one dtype and device, of the same shapes on every rank.
        largest: elements of a bucket.

    Returns:
        The means, as views of the buckets; the tensors themselves in a single process.
    """
    if not collectives.is_distributed():
        return list(tensors)
    world = collectives.world_size()
    out: list[Tensor] = []
    under_way = []
    buckets = cut([t.numel() for t in tensors], largest)
    for bucket in buckets:
        flat = torch.cat([tensors[i].reshape(-1) for i in bucket])
        under_way.append((flat, dist.all_reduce(flat, async_op=True)))
    for bucket, (flat, handle) in zip(buckets, under_way, strict=True):
        if handle is not None:
            handle.wait()
        flat.div_(world)
        pieces = torch.split(flat, [tensors[i].numel() for i in bucket])
        out.extend(piece.view(tensors[i].shape) for i, piece in zip(bucket, pieces, strict=True))
    return out


@torch.no_grad()
def same_everywhere(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Overwrite the tensors with those of rank `source`; collective."""
    if not collectives.is_distributed():
        return
    for tensor in tensors:
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        dist.broadcast(whole, src=source)
        if whole is not tensor:
            tensor.copy_(whole)
