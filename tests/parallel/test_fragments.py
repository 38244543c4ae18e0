"""The span table and the exchange, with ranks simulated in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.parallel import collectives
from dsso.parallel.fragments import FragmentExchange, Span, SpanTable


def _flat(sizes: dict[str, int], world: int) -> SpanTable:
    """ZeRO-1/2: one flat buffer in equal slices, which cut parameters anywhere."""
    total = sum(sizes.values())
    piece = -(-total // world)
    ranks = []
    for rank in range(world):
        low, high, at, spans = rank * piece, min((rank + 1) * piece, total), 0, []
        for name, size in sizes.items():
            start, end = max(low, at), min(high, at + size)
            if start < end:
                spans.append(Span(name, start - at, end - start, 0, start - low))
            at += size
        ranks.append(tuple(spans))
    return SpanTable(sizes, tuple(ranks))


def _sliced(sizes: dict[str, int], world: int) -> SpanTable:
    """ZeRO-3: an equal slice of every parameter, the last ones short or empty."""
    ranks = []
    for rank in range(world):
        offset, spans = 0, []
        for name, size in sizes.items():
            piece = -(-size // world)
            start = min(rank * piece, size)
            spans.append(Span(name, start, min(piece, size - start), 0, offset))
            offset += piece
        ranks.append(tuple(spans))
    return SpanTable(sizes, tuple(ranks))


def _replicated(sizes: dict[str, int], world: int) -> SpanTable:
    spans = tuple(Span(name, 0, size, i, 0) for i, (name, size) in enumerate(sizes.items()))
    return SpanTable(sizes, (spans,) * world)


LAYOUTS = {"flat": _flat, "sliced": _sliced, "replicated": _replicated}


def _buffers(table: SpanTable, rank: int, whole: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    lengths: dict[int, int] = {}
    for span in table.ranks[rank]:
        lengths[span.buffer] = max(lengths.get(span.buffer, 0), span.offset + span.numel)
    buffers = [torch.full((lengths.get(i, 0) + 3,), -1.0) for i in range(max(lengths, default=0) + 1)]
    for span in table.ranks[rank]:
        piece = whole[span.name][span.start : span.start + span.numel]
        buffers[span.buffer][span.offset : span.offset + span.numel] = piece
    return buffers


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=7),
    world=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_gather_then_scatter(layout: str, lengths: list[int], world: int, seed: int) -> None:
    sizes = {f"p{i}": n for i, n in enumerate(lengths)}
    table = LAYOUTS[layout](sizes, world)
    table.check()
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    # The last parameter is left to its holders.
    names = list(sizes)[:-1] or list(sizes)
    # One worker a parameter, or several.
    workers = {
        name: tuple(torch.randperm(world, generator=generator)[: 1 + seed % world].tolist()) for name in names
    }
    ranks = [FragmentExchange(table, workers, rank) for rank in range(world)]
    buffers = [_buffers(table, rank, whole) for rank in range(world)]

    patch = pytest.MonkeyPatch()
    try:
        # First round: note what every rank sends; second round: deliver it.
        for phase in ("gather", "scatter"):
            sent: list[list[torch.Tensor]] = []

            def record(send, send_sizes, receive_sizes, sent=sent):
                sent.append(list(send.split(send_sizes)))
                return send.new_zeros(sum(receive_sizes))

            patch.setattr(collectives, "all_to_all", record)
            for rank in range(world):
                if phase == "gather":
                    ranks[rank].gather(buffers[rank])
                else:
                    ranks[rank].scatter(
                        {n: whole[n] * 2 for n in ranks[rank].owned}, [b.clone() for b in buffers[rank]]
                    )
            for rank in range(world):

                def deliver(send, send_sizes, receive_sizes, rank=rank, sent=sent):
                    got = [sent[other][rank] for other in range(world)]
                    assert [piece.numel() for piece in got] == receive_sizes
                    return torch.cat(got)

                patch.setattr(collectives, "all_to_all", deliver)
                if phase == "gather":
                    got = ranks[rank].gather(buffers[rank])
                    assert list(got) == [n for n in names if rank in workers[n]]
                    for name, value in got.items():
                        assert torch.equal(value, whole[name])
                else:
                    ranks[rank].scatter({n: whole[n] * 2 for n in ranks[rank].owned}, buffers[rank])
    finally:
        patch.undo()
    doubled = {name: whole[name] * (2 if name in workers else 1) for name in sizes}
    for rank in range(world):
        for mine, wanted in zip(buffers[rank], _buffers(table, rank, doubled), strict=True):
            assert torch.equal(mine, wanted)


def test_a_hole_is_named() -> None:
    table = SpanTable({"w": 10}, ((Span("w", 0, 4, 0, 0),), (Span("w", 5, 5, 0, 0),)))
    with pytest.raises(ValueError, match="element 4 of parameter 'w'"):
        table.check()


def test_overlap_of_partial_pieces_is_refused() -> None:
    table = SpanTable({"w": 10}, ((Span("w", 0, 6, 0, 0),), (Span("w", 4, 6, 0, 0),)))
    with pytest.raises(ValueError, match="overlap"):
        table.cover("w", 0)
