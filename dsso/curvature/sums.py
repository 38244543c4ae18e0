"""What one accumulation window gathers of one Kronecker factor: sums of outer products, or sketches of them.

Everything here is linear in the data, so that micro-batches and ranks may be added up in any order.

Legend of shape suffixes: `N` rows, `D` side of a block, `K` rank of a low-rank form, `P` packed triangle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsso.linalg import lowrank, triangle


class FactorSum:
    """Sum of x x^T over rows, block by block along the diagonal, and the number of rows.

    Memory is taken with the first row: a layer that was not used costs nothing.

    Args:
        blocks: sides; rows are cut accordingly.
        bases: for each block the basis of its low-rank form, [D, K], or None where it is dense.
        like: gives dtype and device.

    Attributes:
        parts: per block the sum, [D, D] with a valid upper triangle, or the sketch, [D, K]; empty while unused.
        traces: per block the trace of a low-rank one, else None.
        count: rows, scalar tensor.
    """

    def __init__(self, blocks: Sequence[int], bases: Sequence[Tensor | None], like: Tensor) -> None:
        self.blocks = tuple(blocks)
        self.bases = tuple(bases)
        self.parts: list[Tensor] = []
        self.traces: list[Tensor | None] = []
        self.count = like.new_zeros(())
        self._like = like

    def _allocate(self) -> None:
        for side, basis in zip(self.blocks, self.bases, strict=True):
            # A dense sum is written by its first rows; below the diagonal it holds anything.
            self.parts.append(
                self._like.new_empty(side, side)
                if basis is None
                else self._like.new_zeros(side, basis.shape[1])
            )
            self.traces.append(None if basis is None else self._like.new_zeros(()))

    def add(self, x_ND: Tensor, count: Tensor | float, scale: float = 1.0) -> None:
        """Add rows.

        Args:
            x_ND: rows; those that do not count are zero.
            count: how many do.
            scale: of their outer products.
        """
        fresh = not self.parts
        if fresh:
            self._allocate()
        self.count = self.count + count
        at = 0
        for index, side in enumerate(self.blocks):
            rows_ND = x_ND[:, at : at + side]
            at += side
            basis, trace = self.bases[index], self.traces[index]
            if basis is None or trace is None:
                triangle.add_gram_(self.parts[index], rows_ND, scale, 0.0 if fresh else 1.0)
            else:
                self.parts[index].add_(lowrank.sketch(rows_ND, basis), alpha=scale)
                trace.add_(torch.linalg.vector_norm(rows_ND).square(), alpha=scale)

    def forget(self) -> None:
        """Give the memory of the sums back; the count stays."""
        self.parts, self.traces = [], []

    def bad(self) -> Tensor:
        """Whether anything in it is not finite, a boolean scalar tensor."""
        wrong = torch.zeros((), dtype=torch.bool, device=self._like.device)
        for part, trace in zip(self.parts, self.traces, strict=True):
            # A diagonal is finite exactly when no squared entry overflowed or is NaN; any such row shows there.
            wrong = wrong | ~torch.isfinite(part.diagonal().sum() if trace is None else trace + part.sum())
        return wrong

    @property
    def size(self) -> int:
        """Numbers on the wire."""
        return sum(
            triangle.packed_size(side) if basis is None else basis.numel() + 1
            for side, basis in zip(self.blocks, self.bases, strict=True)
        )

    def pack_into(self, out: Tensor) -> None:
        """Write the wire form into a contiguous vector of `size` numbers; zeros where nothing was added."""
        if not self.parts:
            out.zero_()
            return
        at = 0
        for side, part, trace in zip(self.blocks, self.parts, self.traces, strict=True):
            if trace is None:
                length = triangle.packed_size(side)
                triangle.pack_into(out.narrow(0, at, length), part)
            else:
                length = part.numel() + 1
                out.narrow(0, at, length - 1).copy_(part.reshape(-1))
                out[at + length - 1] = trace
            at += length

    def unpack(self, wire: Tensor, count: Tensor) -> None:
        """Become what `pack_into` wrote, summed over ranks."""
        self.parts, self.traces, self.count = [], [], count
        at = 0
        for side, basis in zip(self.blocks, self.bases, strict=True):
            if basis is None:
                length = triangle.packed_size(side)
                self.parts.append(triangle.unpack(wire.narrow(0, at, length), side))
                self.traces.append(None)
            else:
                length = basis.numel() + 1
                self.parts.append(wire.narrow(0, at, length - 1).view(basis.shape))
                self.traces.append(wire[at + length - 1])
            at += length
