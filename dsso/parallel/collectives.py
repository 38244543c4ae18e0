"""The few collectives that dsso uses, as no-ops in a single process.

Every rank calls each of them the same number of times in the same order, also a rank without a local piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True where a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def gather_objects(obj: Any) -> list[Any]:
    """One picklable object from every rank, in rank order, on every rank."""
    if not is_distributed():
        return [obj]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, obj)
    return out


def problem_on_rank_0(action: Callable[[], object]) -> str | None:
    """Let rank 0 do something with files; what went wrong, on every rank, or None.

    Args:
        action: called on rank 0 alone.
    """
    problem = None
    if rank() == 0:
        try:
            action()
        except OSError as error:
            problem = str(error)
    found: str | None = gather_objects(problem)[0]
    return found


def first_named(name: str) -> str:
    """The first name that is not empty among those of all ranks, on every rank; empty where there is none."""
    return next((one for one in gather_objects(name) if one), "")


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """The object of rank `source`, on every rank."""
    if not is_distributed():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def any_flag(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every rank when the flag is set on any; synchronizes with the host."""
    if not is_distributed():
        return flag
    box = torch.tensor([1.0 if flag else 0.0], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item() > 0)


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor is returned. No host synchronization."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def reduce_to_owners(pieces: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Sum one buffer per owner over all ranks; each rank gets the sum of the buffer addressed to it.

    Args:
        pieces: this rank's contribution to every owner, 1-D; None stands for zeros.
        sizes: elements of each owner's buffer, the same list on every rank.
        like: gives dtype and device.

    Returns:
        The sum addressed to this rank, of `sizes[rank]` elements.
    """
    me = rank()
    if not is_distributed():
        piece = pieces[0]
        return like.new_zeros(sizes[0]) if piece is None else piece
    mine = like.new_zeros(sizes[me])
    handles = []
    kept = []
    for owner, size in enumerate(sizes):
        if not size:
            continue
        piece = pieces[owner]
        buffer = like.new_zeros(size) if piece is None else piece.contiguous()
        kept.append(buffer)
        handles.append(dist.reduce(buffer, dst=owner, async_op=True))
        if owner == me:
            mine = buffer
    for handle in handles:
        if handle is not None:
            handle.wait()
    return mine


def all_to_all(send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
    """Exchange slices of a 1-D buffer: slice j goes to rank j.

    Args:
        send: [sum(send_sizes)], slices in rank order.
        send_sizes: elements for each rank.
        receive_sizes: elements from each rank.

    Returns:
        [sum(receive_sizes)], slices in rank order.
    """
    if not is_distributed():
        return send
    out = send.new_empty(sum(receive_sizes))
    dist.all_to_all_single(out, send, list(receive_sizes), list(send_sizes))
    return out
