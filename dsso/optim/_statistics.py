"""A window's statistics: opened for the factors that are due, summed over all ranks, averaged at their owners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dsso.curvature.hooks import Capture
from dsso.curvature.sums import FactorSum
from dsso.optim._factor import Factor
from dsso.parallel import collectives
from dsso.parallel.buckets import OwnerBuckets
from dsso.parallel.placement import Placement


class Statistics:
    """The way from the hooks to the factors.

    Args:
        capture: measures.
        placement: who owns what.
        factors: those that this rank keeps, by key.
        rank: this rank.
        like: gives device and the dtype of the statistics.
        bucket_elements: numbers in a bucket on the wire.
        wire: dtype on the wire.
        overlap: send a factor as soon as the backward pass is through with it.
        each_pass: send after every backward pass of a window; else once, after the last.

    Attributes:
        sent: numbers that this rank has put on the wire for statistics so far, counts and bases not included.
    """

    def __init__(
        self,
        capture: Capture,
        placement: Placement,
        factors: Mapping[str, Factor],
        rank: int,
        like: Tensor,
        bucket_elements: int,
        wire: torch.dtype,
        overlap: bool,
        each_pass: bool = False,
    ) -> None:
        self.capture = capture
        self._placement = placement
        self._factors = factors
        self._rank = rank
        self._like = like
        self._bucket_elements = bucket_elements
        self._wire = wire
        self._distributed = collectives.is_distributed()
        self._group = dist.new_group() if self._distributed else None
        self._buckets: OwnerBuckets | None = None
        self._each_pass = each_pass and self._distributed
        # What has come of earlier passes of the window, by factor.
        self._arrived: dict[str, Tensor] = {}
        # The backward pass reaches the last layer first.
        self._order = list(reversed(placement.factors))
        self._queue: list[str] = []
        self._ready: set[str] = set()
        self._bad: Tensor | None = None
        self.sent = 0
        if overlap and self._distributed:
            capture.on_final = self._final
            capture.final_in_each_pass = self._each_pass

    def open(self, keys: Collection[str], step: int) -> None:
        """Measure these factors in the window to come; collective where one of them is of low rank."""
        if self._distributed and self.capture.active:
            # The engine has dropped the step of the window before, on all ranks, and some sums are on their way: how
            # many, may differ. The exchange is brought to its end, and what comes is thrown away.
            self._receive()
        self._queue = [key for key in self._order if key in keys]
        self._ready.clear()
        self._arrived.clear()
        self._buckets = None
        self._bad = None
        if not self._queue:
            self.capture.close()
            return
        bases = self._bases(self._queue)
        dims = self._placement.factors
        sums = {key: FactorSum(dims[key].blocks, bases[key], self._like) for key in self._queue}
        self.capture.open(sums, step)

    def _bases(self, keys: Collection[str]) -> dict[str, list[Tensor | None]]:
        """Bases of the low-rank blocks, from the factors' owners."""
        dims = self._placement.factors
        out: dict[str, list[Tensor | None]] = {key: [None] * len(dims[key].blocks) for key in keys}
        low = [key for key in keys if any(dims[key].kept_rank(d) for d in dims[key].blocks)]
        if not self._distributed:
            return out | {key: self._factors[key].bases for key in low}
        for owner in range(self._placement.world_size):
            theirs = [key for key in low if self._placement.factor_owners[key][0] == owner]
            if not theirs:
                continue
            shapes = [
                (key, i, d, dims[key].kept_rank(d)) for key in theirs for i, d in enumerate(dims[key].blocks)
            ]
            shapes = [one for one in shapes if one[3]]
            flat = self._like.new_empty(sum(d * k for _, _, d, k in shapes))
            at = 0
            for key, index, d, k in shapes:
                view = flat.narrow(0, at, d * k).view(d, k)
                at += d * k
                if owner == self._rank:
                    basis = self._factors[key].bases[index]
                    assert basis is not None
                    view.copy_(basis)
                out[key][index] = view
            dist.broadcast(flat, group_src=owner, group=self._group)
        return out

    def _final(self, key: str) -> None:
        """A factor's sum is complete on this rank; send what is complete, in the order that all ranks keep."""
        self._ready.add(key)
        while self._queue and self._queue[0] in self._ready:
            self._send(self._queue.pop(0), wait=False)

    def _send(self, key: str, wait: bool = True) -> None:
        if self._buckets is None:
            coming: Counter[int] = Counter()
            for one in (key, *self._queue):
                coming.update(dict.fromkeys(self._placement.factor_owners[one], self.capture.sums[one].size))
            self._buckets = OwnerBuckets(
                self._bucket_elements, self._like, self._wire, self._group, coming=coming
            )
        found = self.capture.sums[key]
        self._note_bad(found)
        wire = self._like.new_empty(found.size)
        found.pack_into(wire)
        self._buckets.put(self._placement.factor_owners[key], wire, wait)
        found.forget()

    def next_pass(self) -> None:
        """Another micro-batch of the window begins its backward pass: what those before gave goes to the owners."""
        if self._each_pass and self.capture.active:
            self._receive()
            self._buckets = None
            self._queue = [key for key in self._order if key in self.capture.sums]
            self._ready.clear()

    def _receive(self) -> None:
        """Bring the exchange to its end; what has come is added to what came before."""
        self._send_rest()
        assert self._buckets is not None
        mine = [
            key
            for key in self._order
            if key in self.capture.sums and self._rank in self._placement.factor_owners[key]
        ]
        for key, wire in zip(mine, self._buckets.finish(), strict=True):
            before = self._arrived.get(key)
            self._arrived[key] = wire if before is None else before.add_(wire)
        self.sent += self._buckets.sent

    def _send_rest(self) -> None:
        while self._queue:
            self._send(self._queue.pop(0))

    def _note_bad(self, found: FactorSum) -> None:
        bad = found.bad()
        self._bad = bad if self._bad is None else self._bad | bad

    def measured_badly(self) -> Tensor | None:
        """Whether any sum of the window is not finite on this rank; None when nothing is measured."""
        if not self.capture.active:
            return None
        if self._distributed:
            self._send_rest()
        else:
            for found in self.capture.sums.values():
                self._note_bad(found)
        return self._bad

    def average(self, bad: Tensor, decay: float) -> None:
        """Take the sums of all ranks into the factors that this rank owns, nothing where `bad`; collective."""
        sums = self.capture.sums
        order = [key for key in self._order if key in sums]
        terms = self.capture.terms
        # A number is filled in on the device; a copy from the host would wait for it.
        if not isinstance(terms, Tensor):
            terms = self._like.new_full((), terms)
        terms = terms.to(dtype=self._like.dtype, device=self._like.device)
        counted = torch.stack([*(sums[key].count for key in order), terms])
        if self._distributed:
            dist.all_reduce(counted, group=self._group)
        # The terms behind a G are the window's, whichever of them reached the layer; none where no rank used it.
        inputs = set(self.capture.a_keys)
        counts = {
            key: counted[i] if key in inputs else torch.where(counted[i] > 0, counted[-1], counted[i])
            for i, key in enumerate(order)
        }
        mine = order
        if self._distributed:
            self._receive()
            mine = list(self._arrived)
        for key in mine:
            # Unpacked one at a time: a matrix is twice its triangle.
            if key in self._arrived:
                sums[key].unpack(self._arrived.pop(key), sums[key].count)
            self._factors[key].average(sums[key], counts[key], bad, decay)
            sums[key].forget()
        self.capture.close()

    def close(self) -> None:
        """Take the hooks off the model and end the process group of the exchange."""
        self.capture.remove()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def send_factorizations(
    keys: Collection[str],
    sources: Mapping[str, Mapping[int, int]],
    factors: Mapping[str, Factor],
    rank: int,
    world: int,
    like: Tensor,
) -> None:
    """Bring fresh factorizations from the ranks that made them to those that only apply them; collective.

    Args:
        keys: refreshed factors, the same on every rank.
        sources: of the placement.
        factors: those that this rank keeps.
        rank: this rank.
        world: number of ranks.
        like: gives device and dtype.
    """
    routes = [
        (key, source, user) for key in keys for user, source in sorted(sources[key].items()) if source != user
    ]
    if not routes:
        return
    send = [(key, user) for key, source, user in sorted(routes, key=lambda r: (r[2], r[0])) if source == rank]
    receive = [
        (key, source) for key, source, user in sorted(routes, key=lambda r: (r[1], r[0])) if user == rank
    ]
    sizes = {key: factors[key].wire_size for key, _ in [*send, *receive]}
    out = torch.cat([factors[key].to_wire() for key, _ in send]) if send else like.new_empty(0)
    got = collectives.all_to_all(
        out,
        [sum(sizes[k] for k, u in send if u == other) for other in range(world)],
        [sum(sizes[k] for k, s in receive if s == other) for other in range(world)],
    )
    at = 0
    for key, _ in receive:
        factors[key].from_wire(got.narrow(0, at, sizes[key]))
        at += sizes[key]
