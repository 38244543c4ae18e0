"""Sum vectors over all ranks at their owners, in buckets of bounded size, started as soon as they are full.

Every rank puts the same vectors, of the same sizes, for the same owners, in the same order; only the contents differ.
A bucket belongs to one owner and may cut a vector anywhere, so neither many small vectors nor one large one decide
how much is under way at a time.

The exchange has a process group of its own: it may run beside the engine's collectives, whose order it must not
disturb. The group is the one that the buckets were made for; two groups of equal size never share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsso.phases import phased


@dataclass
class _Bucket:
    """One buffer on its way to one owner."""

    owner: int
    data: Tensor
    filled: int = 0
    handle: dist.Work | None = None


@dataclass
class _Arrival:
    """Where the pieces of one vector addressed to this rank lie."""

    size: int
    pieces: list[tuple[_Bucket, int, int]] = field(default_factory=list)


class OwnerBuckets:
    """One round of vectors.

    Args:
        capacity: numbers in a bucket.
        like: gives the device.
        dtype: on the wire.
        group: process group; owners are numbered as its ranks are. None: the default group.
        ahead: buckets under way at a time, where `put` may wait.
        coming: numbers that will be put for each owner; buffers are not made larger than that. None: not known.

    Attributes:
        sent: numbers put on the wire by this rank, for accounting.
    """

    def __init__(
        self,
        capacity: int,
        like: Tensor,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
        ahead: int = 4,
        coming: Mapping[int, int] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a bucket holds at least one number, got {capacity}")
        self._capacity = capacity
        self._like = like
        self._dtype = dtype
        self._group = group
        self._ahead = ahead
        self._coming = None if coming is None else dict(coming)
        self._me = dist.get_rank(group)
        self._open: dict[int, _Bucket] = {}
        self._under_way: list[_Bucket] = []
        self._arrivals: list[_Arrival] = []
        self.sent = 0

    @phased("reduce")
    def put(self, owners: Sequence[int], values: Tensor, wait: bool = True) -> None:
        """Add one vector.

        Args:
            owners: ranks that get the sum, each in a bucket of its own.
            values: 1-D; copied, it may be reused at once.
            wait: for buckets on their way, when there are many. Not within a backward pass: there, a rank that
                leaves a layer out gets its vectors ready later than others, who must not hold up the collectives
                of the engine that it has reached by then.
        """
        for owner in owners:
            arrival = _Arrival(values.numel())
            at = 0
            while at < values.numel():
                bucket = self._open.get(owner)
                if bucket is None:
                    bucket = self._open[owner] = _Bucket(owner, self._buffer(owner))
                take = min(values.numel() - at, bucket.data.numel() - bucket.filled)
                bucket.data.narrow(0, bucket.filled, take).copy_(values.narrow(0, at, take))
                arrival.pieces.append((bucket, bucket.filled, take))
                bucket.filled += take
                at += take
                if bucket.filled == bucket.data.numel():
                    self._launch(self._open.pop(owner), wait)
            if owner == self._me:
                self._arrivals.append(arrival)

    def _buffer(self, owner: int) -> Tensor:
        length = self._capacity
        if self._coming is not None:
            length = min(length, self._coming[owner])
            self._coming[owner] -= length
        return self._like.new_zeros(length, dtype=self._dtype)

    def _launch(self, bucket: _Bucket, wait: bool = True) -> None:
        bucket.data = bucket.data.narrow(0, 0, bucket.filled)
        self.sent += bucket.filled
        bucket.handle = dist.reduce(bucket.data, group_dst=bucket.owner, group=self._group, async_op=True)
        self._under_way.append(bucket)
        while len(self._under_way) > self._ahead and (wait or self._has_come(self._under_way[0])):
            self._wait(self._under_way.pop(0))

    @staticmethod
    def _has_come(bucket: _Bucket) -> bool:
        return bucket.handle is None or bucket.handle.is_completed()

    def _wait(self, bucket: _Bucket) -> None:
        if bucket.handle is not None:
            bucket.handle.wait()
        bucket.handle = None
        if bucket.owner != self._me:
            bucket.data = self._like.new_empty(0, dtype=self._dtype)

    @phased("reduce")
    def finish(self) -> list[Tensor]:
        """Send what is left and wait for all.

        Returns:
            The sums addressed to this rank, in the order in which they were put, in the dtype of `like`.
        """
        for owner in sorted(self._open):
            self._launch(self._open.pop(owner))
        while self._under_way:
            self._wait(self._under_way.pop(0))
        out = []
        for arrival in self._arrivals:
            pieces = [bucket.data.narrow(0, at, length) for bucket, at, length in arrival.pieces]
            whole = (
                pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self._like.new_empty(0)
            )
            out.append(whole.to(self._like.dtype))
        self._arrivals.clear()
        return out
