"""Pieces of parameters in files, by name and place: written by whoever holds them, read back in any other split.

A piece is a 1-D tensor under the key `<kind>/<parameter>@<first element>`; `kind` is `weight` or the name of a
moment. Nothing in a file tells of ranks, stages or engines, so nothing there has to agree when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from dsso.errors import RunError
from dsso.parallel.fragments import Span, SpanTable


def piece_key(kind: str, name: str, start: int) -> str:
    """Key of the piece of parameter `name` that begins at element `start`."""
    return f"{kind}/{name}@{start}"


def written_by(table: SpanTable, rank: int) -> list[Span]:
    """What one rank writes so that every element is written once, and each rank its even share.

    A span that k ranks hold alike (replicas: all of them) is cut into k parts of nearly the same length.

    Args:
        table: spans of every rank.
        rank: whose share.
    """
    holders: dict[tuple[str, int, int], list[int]] = {}
    for who, spans in enumerate(table.ranks):
        for span in spans:
            holders.setdefault((span.name, span.start, span.numel), []).append(who)
    mine = []
    for span in table.ranks[rank]:
        among = holders[(span.name, span.start, span.numel)]
        turn = among.index(rank)
        first, end = (span.numel * part // len(among) for part in (turn, turn + 1))
        if end > first:
            mine.append(
                replace(span, start=span.start + first, numel=end - first, offset=span.offset + first)
            )
    return mine


@dataclass(frozen=True)
class _Stored:
    """One piece in one file."""

    start: int
    numel: int
    file: int
    key: str


class PieceFiles:
    """Reads pieces from all files of a checkpoint, only the elements that are asked for.

    Use it as a context manager: the files stay mapped in between.

    Args:
        files: as their writers left them, in any order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._archives: list[Any] = []
        self._index: dict[tuple[str, str], list[_Stored]] = {}
        for number, file in enumerate(files):
            archive = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            self._archives.append(archive)
            keys: list[str] = archive.keys()
            for key in keys:
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                numel = archive.get_slice(key).get_shape()[0]
                self._index.setdefault((kind, name), []).append(_Stored(int(start), numel, number, key))
        for pieces in self._index.values():
            pieces.sort(key=lambda piece: piece.start)

    def __enter__(self) -> PieceFiles:
        """The reader itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Unmap the files."""
        self._stack.close()

    def read_into(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the elements from `start` on of one kind of one parameter.

        Args:
            kind: `weight` or the name of a moment.
            name: the parameter.
            start: first element.
            out: 1-D, of any dtype and device.

        Raises:
            RunError: when an element is in no file.
        """
        end = start + out.numel()
        reached = start
        for piece in self._index.get((kind, name), []):
            last = min(end, piece.start + piece.numel)
            if piece.start <= reached < last:
                found = self._archives[piece.file].get_slice(piece.key)[
                    reached - piece.start : last - piece.start
                ]
                out.narrow(0, reached - start, last - reached).copy_(found)
                reached = last
        if reached < end:
            raise RunError(
                f"the checkpoint lacks element {reached} of the {kind} of a parameter",
                where=name,
                remedy="resume from an older checkpoint",
            )
