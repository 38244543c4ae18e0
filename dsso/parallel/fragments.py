"""Who holds which piece of every parameter, and moving whole gradients to who works on them and updates back.

One table of spans serves every engine: a replica holds one span of everything, ZeRO-1/2 a slice of a flat buffer
that may cut a parameter anywhere, ZeRO-3 an equal slice of each parameter. Two `all_to_all_single` a step move
all of it, instead of one collective a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsso.parallel import collectives
from dsso.phases import phased


@dataclass(frozen=True)
class Span:
    """A contiguous piece of one parameter, held in one of a rank's flat buffers.

    Attributes:
        name: the parameter.
        start: first element, in the flattened parameter.
        numel: number of elements.
        buffer: index of the flat buffer.
        offset: first element, in the buffer.
    """

    name: str
    start: int
    numel: int
    buffer: int
    offset: int


@dataclass(frozen=True)
class SpanTable:
    """The spans of every rank.

    Attributes:
        sizes: elements of every parameter, by name, in the order of the model.
        ranks: the spans of each rank, in buffer order.
    """

    sizes: dict[str, int]
    ranks: tuple[tuple[Span, ...], ...]

    @classmethod
    def collect(cls, sizes: Mapping[str, int], local: Sequence[Span]) -> SpanTable:
        """Build the table from each rank's own spans; collective."""
        return cls(dict(sizes), tuple(tuple(spans) for spans in collectives.gather_objects(list(local))))

    def check(self) -> None:
        """Every element of every parameter is held by some rank.

        Raises:
            ValueError: naming the parameter and the first element that nobody holds.
        """
        for name, size in self.sizes.items():
            pieces = sorted(
                (s.start, s.start + s.numel) for spans in self.ranks for s in spans if s.name == name
            )
            reached = 0
            for start, end in pieces:
                if start > reached:
                    break
                reached = max(reached, end)
            if reached != size:
                raise ValueError(f"no rank holds element {reached} of parameter {name!r} ({size} elements)")

    def cover(self, name: str, prefer: int) -> list[tuple[int, Span]]:
        """Pieces `(rank, span)` that make up the parameter once, from `prefer` alone where it holds all."""
        held = [(r, s) for r, spans in enumerate(self.ranks) for s in spans if s.name == name and s.numel]
        for r, span in held:
            if r == prefer and span.numel == self.sizes[name]:
                return [(r, span)]
        chosen: list[tuple[int, Span]] = []
        reached = 0
        for r, span in sorted(held, key=lambda item: (item[1].start, item[0])):
            if span.start == reached:
                chosen.append((r, span))
                reached += span.numel
        if reached != self.sizes[name]:
            raise ValueError(f"the pieces of parameter {name!r} overlap or leave a gap at element {reached}")
        return chosen


@dataclass(frozen=True)
class _Copy:
    """One contiguous copy between a flat buffer and the wire, or between the wire and a parameter."""

    name: str
    start: int
    numel: int
    buffer: int
    offset: int


class FragmentExchange:
    """Moves whole parameters' worth of values between the holders of their pieces and those who work on them.

    Args:
        table: spans of every rank.
        workers: ranks that work on each parameter, for the parameters to be moved, in model order. Each of them
            gets all of it; a holder takes the answer from itself where it is one of them.
        rank: this rank.

    Attributes:
        owned: parameters that this rank works on.
    """

    def __init__(self, table: SpanTable, workers: Mapping[str, Sequence[int]], rank: int) -> None:
        self.rank = rank
        self.owned = [name for name, ranks in workers.items() if rank in ranks]
        self.sizes = table.sizes
        world = len(table.ranks)
        covers = {(name, w): table.cover(name, w) for name, ranks in workers.items() for w in ranks}

        def answers(name: str, holder: int) -> int:
            ranks = workers[name]
            return holder if holder in ranks else ranks[holder % len(ranks)]

        # Holder side of "gather" (what I send) and of "scatter" (what I receive), worker by worker.
        self._sent = [
            [
                self._copy(s)
                for n, ranks in workers.items()
                if worker in ranks
                for r, s in covers[n, worker]
                if r == rank
            ]
            for worker in range(world)
        ]
        mine: dict[str, list[Span]] = {}
        for span in table.ranks[rank]:
            mine.setdefault(span.name, []).append(span)
        self._returned = [
            [self._copy(s) for n in workers if answers(n, rank) == worker for s in mine.get(n, []) if s.numel]
            for worker in range(world)
        ]
        # Worker side: what each holder sends me, and what I send back to each holder.
        held = [[s for s in spans if s.name in workers and s.numel] for spans in table.ranks]
        self._received = [
            [self._copy(s) for n in self.owned for r, s in covers[n, rank] if r == holder]
            for holder in range(world)
        ]
        self._answered = [
            [
                self._copy(s)
                for n in self.owned
                if answers(n, holder) == rank
                for s in held[holder]
                if s.name == n
            ]
            for holder in range(world)
        ]
        # One rank that holds every parameter in one piece has nothing to move.
        pieces = [c for row in self._received for c in row]
        self._own = pieces if world == 1 and all(c.numel == self.sizes[c.name] for c in pieces) else None

    @staticmethod
    def _copy(span: Span) -> _Copy:
        return _Copy(span.name, span.start, span.numel, span.buffer, span.offset)

    @phased("gather")
    def gather(self, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole flattened values of the parameters that this rank owns, from the holders' flat buffers.

        Args:
            buffers: this rank's flat buffers (gradients, say), all of one dtype and device.

        Returns:
            Name to 1-D tensor; the tensors are views of one buffer, or of `buffers` where nothing had to be moved.
        """
        if self._own is not None:
            return {c.name: buffers[c.buffer].narrow(0, c.offset, c.numel) for c in self._own}
        send = _join(
            [buffers[c.buffer].narrow(0, c.offset, c.numel) for row in self._sent for c in row], buffers
        )
        got = collectives.all_to_all(send, _totals(self._sent), _totals(self._received))
        whole = got.new_empty(sum(self.sizes[name] for name in self.owned))
        views: dict[str, Tensor] = {}
        at = 0
        for name in self.owned:
            views[name] = whole.narrow(0, at, self.sizes[name])
            at += self.sizes[name]
        at = 0
        for row in self._received:
            for c in row:
                views[c.name].narrow(0, c.start, c.numel).copy_(got.narrow(0, at, c.numel))
                at += c.numel
        return views

    @phased("write back")
    def scatter(self, values: Mapping[str, Tensor], buffers: Sequence[Tensor]) -> None:
        """Write owners' values back into every holder's flat buffers, in place.

        Args:
            values: name to flattened tensor, for every parameter that this rank owns.
            buffers: this rank's flat buffers; every replica of a piece is written.
        """
        if self._own is not None:
            into = [buffers[c.buffer].narrow(0, c.offset, c.numel) for c in self._own]
            torch._foreach_copy_(into, [values[c.name] for c in self._own])
            return
        send = _join(
            [values[c.name].narrow(0, c.start, c.numel) for row in self._answered for c in row], buffers
        )
        got = collectives.all_to_all(send, _totals(self._answered), _totals(self._returned))
        at = 0
        for row in self._returned:
            for c in row:
                buffers[c.buffer].narrow(0, c.offset, c.numel).copy_(got.narrow(0, at, c.numel))
                at += c.numel


def _totals(rows: Sequence[Sequence[_Copy]]) -> list[int]:
    return [sum(c.numel for c in row) for row in rows]


def _join(pieces: list[Tensor], buffers: Sequence[Tensor]) -> Tensor:
    if pieces:
        return torch.cat(pieces)
    return buffers[0].new_empty(0)
