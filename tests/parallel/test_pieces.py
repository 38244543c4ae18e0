"""Pieces written in one split are read in any other, every element once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsso.errors import RunError
from dsso.parallel.fragments import Span, SpanTable
from dsso.parallel.pieces import PieceFiles, piece_key, written_by

NAMES = ("layer.0.weight", "odd@name/with.signs", "bias", "scale")
LAYOUTS = ("replicas", "flat", "slices", "pairs")


def table(layout: str, sizes: dict[str, int], world: int) -> SpanTable:
    """As the engines lay parameters out."""
    ranks: list[list[Span]] = [[] for _ in range(world)]
    whole = [Span(n, 0, size, i, 0) for i, (n, size) in enumerate(sizes.items())]
    share = -(-sum(sizes.values()) // world)
    for rank, spans in enumerate(ranks):
        at = 0
        for index, (name, size) in enumerate(sizes.items()):
            if layout == "flat":  # ZeRO 1 and 2: a slice of one buffer, which cuts anywhere
                first, last = max(at, rank * share), min(at + size, (rank + 1) * share)
                if last > first:
                    spans.append(Span(name, first - at, last - first, 0, first - rank * share))
                at += size
            elif (
                layout != "replicas"
            ):  # ZeRO 3, FSDP2: equal slices, empty ones too; or each held by two ranks
                parts, turn = (world, rank) if layout == "slices" else (-(-world // 2), rank // 2)
                piece = -(-size // parts)
                start = min(turn * piece, size)
                spans.append(Span(name, start, min(piece, size - start), index, 0))
    if layout == "replicas":
        return SpanTable(sizes, tuple(tuple(whole) for _ in ranks))
    # A rank may hold nothing.
    return SpanTable(sizes, tuple(tuple(spans) for spans in ranks))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    before=st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 5)),
    after=st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 5)),
)
def test_any_split_to_any_other(sizes: list[int], before: tuple[str, int], after: tuple[str, int]) -> None:
    shapes = dict(zip(NAMES, sizes, strict=False))
    values = {name: torch.randn(size) for name, size in shapes.items()}
    old, new = (table(layout, shapes, world) for layout, world in (before, after))
    with tempfile.TemporaryDirectory() as folder:
        files, counts = [], []
        for rank in range(before[1]):
            written = written_by(old, rank)
            counts.append(sum(span.numel for span in written))
            pieces = {
                piece_key("weight", s.name, s.start): values[s.name][s.start : s.start + s.numel].clone()
                for s in written
            }
            files.append(Path(folder) / f"{rank}.safetensors")
            save_file(pieces, files[-1])
        assert sum(counts) == sum(sizes), "an element is written twice or not at all"
        if before[0] == "replicas":
            assert max(counts) - min(counts) <= len(sizes)
        with PieceFiles(files) as reader:
            for spans in new.ranks:
                for span in spans:
                    out = torch.full((span.numel,), torch.nan)
                    reader.read_into("weight", span.name, span.start, out)
                    assert torch.equal(out, values[span.name][span.start : span.start + span.numel])


def test_what_a_rank_writes_lies_where_its_span_says() -> None:
    replica = Span("a", 0, 10, 3, 100)
    written = written_by(SpanTable({"a": 10}, ((replica,), (replica,), (replica,))), 1)
    assert written == [Span("a", 3, 3, 3, 103)]


def test_a_gap_is_named(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(
        {piece_key("weight", "a", 0): torch.zeros(4), piece_key("weight", "a", 6): torch.zeros(4)}, file
    )
    with (
        PieceFiles([file]) as reader,
        pytest.raises(RunError, match="lacks element 4 of the weight") as caught,
    ):
        reader.read_into("weight", "a", 2, torch.zeros(6))
    assert str(caught.value).startswith("a: ")
