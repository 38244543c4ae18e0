"""One Kronecker factor where it is kept: the debiased average, its damped factorization, and solving with it.

Legend of shape suffixes: `D` side, `K` rank of a low-rank form, `R` columns of a right-hand side.

A factor never raises and never synchronizes: a factorization that fails leaves the last good one and says so in a
flag, which the method reads a step later and answers with a new attempt in fp64 and with jitter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsso.curvature.sums import FactorSum
from dsso.linalg import kron, lowrank, triangle
from dsso.parallel.placement import FactorDims

Job = Callable[[], list[Tensor]]
"""A factorization to be run: gives what a block needs to take it over, whether it failed as second entry."""


CHOLESKY, INVERSE = "square", "square_inverse"
"""Names of a dense block's square in the state: with the Cholesky factor, with the inverse in its lower triangle."""


class DenseBlock:
    """A dense block: running sum above the diagonal of one square, Cholesky factor or inverse on and below it.

    Args:
        side: of the block.
        like: gives device and the dtype to compute in.
        storage: dtype of the square.
        inverse: the inverse is kept, not the Cholesky factor.
    """

    def __init__(self, side: int, like: Tensor, storage: torch.dtype, inverse: bool = False) -> None:
        self.square_DD = torch.eye(side, dtype=storage, device=like.device)
        self.diagonal_D = like.new_zeros(side)
        self.inverse = inverse

    basis: Tensor | None = None
    parts = 2
    """Tensors that a job returns."""

    def trace(self) -> Tensor:
        """Of the running sum."""
        return self.diagonal_D.sum()

    def average(self, part: Tensor, _trace: Tensor | None, keep: Tensor, take: Tensor) -> None:
        """S <- keep S + part where `take`."""
        triangle.accumulate_(self.square_DD, self.diagonal_D, part, keep, take)

    def job(self, scale: Tensor, shift: Tensor, jitter: float, dtype: torch.dtype) -> Job:
        """Cholesky factor or inverse of scale S + shift I, and whether that failed."""
        damped_DD = triangle.lower_of(self.square_DD, self.diagonal_D, scale, shift, dtype)
        made = kron.inverse if self.inverse else kron.cholesky
        return lambda: list(made(damped_DD, jitter))

    def keep(self, found: list[Tensor], good: Tensor) -> None:
        """Take over what the job found, where `good`."""
        triangle.write_lower_(self.square_DD, found[0], good)

    def solve(self, v_DR: Tensor) -> Tensor:
        """(S + shift)^-1 V."""
        if self.inverse:
            return triangle.multiply_lower(self.square_DD, v_DR)
        return triangle.solve_lower(self.square_DD, v_DR)

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {INVERSE if self.inverse else CHOLESKY: self.square_DD, "diagonal": self.diagonal_D}

    @property
    def wire_size(self) -> int:
        """Numbers of the factorization on the wire."""
        return triangle.packed_size(self.square_DD.shape[0])

    def to_wire(self, like: Tensor) -> Tensor:
        """The factorization as a vector."""
        wire = like.new_empty(self.wire_size)
        triangle.pack_into(wire, self.square_DD.mT)
        return wire

    def from_wire(self, wire: Tensor) -> None:
        """Take over a factorization that another rank made."""
        lower_DD = triangle.unpack(wire, self.square_DD.shape[0]).mT
        triangle.write_lower_(self.square_DD, lower_DD, torch.ones_like(wire[0], dtype=torch.bool))

    def sum(self) -> Tensor:
        """The running sum as a full matrix, [D, D]."""
        return triangle.symmetric(self.square_DD, self.diagonal_D, self.diagonal_D.dtype)


class LowRankBlock:
    """A block as leading eigenpairs and a mean tail, see `dsso.linalg.lowrank`.

    Args:
        side: of the block.
        rank: of the form.
        like: gives device and dtype.
        seed: of the first basis.
        energy: share of the trace that the leading columns in use have to hold; None: all are in use.
    """

    def __init__(self, side: int, rank: int, like: Tensor, seed: int, energy: float | None = None) -> None:
        self.energy = energy
        self.basis = lowrank.start_basis(side, rank, seed, like)
        self.core_KK = like.new_zeros(rank, rank)
        self.total = like.new_zeros(())
        # The basis moves with every window; the inverse belongs to the basis that it was made with.
        self.applied = self.basis.clone()
        self.inverse_KK = like.new_zeros(rank, rank)
        self.tail = like.new_ones(())

    parts = 4
    """Tensors that a job returns."""

    def _form(self) -> lowrank.LowRank:
        return lowrank.LowRank(self.basis, self.core_KK, self.total)

    def trace(self) -> Tensor:
        """Of the running sum."""
        return self.total

    def average(self, part: Tensor, trace: Tensor | None, keep: Tensor, take: Tensor) -> None:
        """S <- keep S + what was sketched, where `take`."""
        assert trace is not None
        zero = torch.zeros_like(trace)
        new = lowrank.update(
            self._form(), torch.where(take, part, zero), torch.where(take, trace, zero), keep
        )
        self.basis.copy_(torch.where(take, new.basis_DK, self.basis))
        self.core_KK.copy_(torch.where(take, new.core_KK, self.core_KK))
        self.total.copy_(torch.where(take, new.trace, self.total))

    def job(self, scale: Tensor, shift: Tensor, jitter: float, dtype: torch.dtype) -> Job:
        """Inverse of scale S + shift I, whether that failed, its tail and its basis."""
        basis_DK = self.basis.clone()
        form = lowrank.LowRank(
            basis_DK.to(dtype), self.core_KK.to(dtype, copy=True), self.total.to(dtype, copy=True)
        )
        if self.energy is not None:
            form = lowrank.leading(form, self.energy)
        if jitter:
            shift = shift + jitter * scale * self.total / self.basis.shape[0]

        def invert() -> list[Tensor]:
            inverse, failed = lowrank.invert(form, scale.to(dtype), shift.to(dtype))
            return [inverse.k_KK, failed, inverse.s, basis_DK]

        return invert

    def keep(self, found: list[Tensor], good: Tensor) -> None:
        """Take over what the job found, where `good`."""
        self.inverse_KK.copy_(torch.where(good, found[0].to(self.inverse_KK.dtype), self.inverse_KK))
        self.tail.copy_(torch.where(good, found[2].to(self.tail.dtype), self.tail))
        self.applied.copy_(torch.where(good, found[3], self.applied))

    def solve(self, v_DR: Tensor) -> Tensor:
        """(S + shift)^-1 V."""
        return lowrank.solve(self.applied, lowrank.Inverse(self.inverse_KK, self.tail), v_DR)

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {
            "basis": self.basis,
            "core": self.core_KK,
            "trace": self.total,
            "applied": self.applied,
            "inverse": self.inverse_KK,
            "tail": self.tail,
        }

    @property
    def wire_size(self) -> int:
        """Numbers of the factorization on the wire."""
        return self.applied.numel() + self.inverse_KK.numel() + 1

    def to_wire(self, like: Tensor) -> Tensor:
        """The factorization as a vector."""
        parts = [self.applied.reshape(-1), self.inverse_KK.reshape(-1), self.tail.reshape(1)]
        return torch.cat(parts).to(like.dtype)

    def from_wire(self, wire: Tensor) -> None:
        """Take over a factorization that another rank made."""
        sizes = [self.applied.numel(), self.inverse_KK.numel(), 1]
        for mine, found in zip(
            (self.applied, self.inverse_KK, self.tail), torch.split(wire, sizes), strict=True
        ):
            mine.copy_(found.view(mine.shape))

    def sum(self) -> Tensor:
        """The running sum as a full matrix, [D, D]."""
        form = self._form()
        eye_DD = torch.eye(self.basis.shape[0], dtype=self.basis.dtype, device=self.basis.device)
        inside_DD = self.basis @ self.basis.mT
        return self.basis @ self.core_KK @ self.basis.mT + lowrank.tail(form) * (eye_DD - inside_DD)


class Block(Protocol):
    """What a factor asks of a block on its diagonal, with a running sum S and a factorization of it."""

    @property
    def basis(self) -> Tensor | None:
        """To sketch the next window with; None where it is measured whole."""

    @property
    def parts(self) -> int:
        """Tensors that a job returns, whether it failed as the second of them."""

    @property
    def wire_size(self) -> int:
        """Numbers of the factorization on the wire."""

    def trace(self) -> Tensor:
        """Of the running sum."""

    def average(self, part: Tensor, trace: Tensor | None, keep: Tensor, take: Tensor, /) -> None:
        """S <- keep S + part where `take`."""

    def job(self, scale: Tensor, shift: Tensor, jitter: float, dtype: torch.dtype) -> Job:
        """What factorizes scale S + shift I, on copies."""

    def keep(self, found: list[Tensor], good: Tensor) -> None:
        """Take over what the job found, where `good`."""

    def solve(self, v_DR: Tensor) -> Tensor:
        """(S + shift)^-1 V."""

    def state(self) -> dict[str, Tensor]:
        """All tensors."""

    def to_wire(self, like: Tensor) -> Tensor:
        """The factorization as a vector."""

    def from_wire(self, wire: Tensor) -> None:
        """Take over a factorization that another rank made."""

    def sum(self) -> Tensor:
        """S as a full matrix, [D, D]."""


def solved_blocks(
    dims: FactorDims, like: Tensor, storage: torch.dtype, energy: float | None, inverse: bool
) -> list[Block]:
    """Blocks that solve: low-rank ones where `dims` says so, else dense ones.

    Args:
        dims: the factor.
        like: gives device and the dtype to compute in.
        storage: dtype of dense blocks.
        energy: see `LowRankBlock`.
        inverse: see `DenseBlock`.
    """
    seed = zlib.crc32(dims.key.encode())
    return [
        LowRankBlock(d, dims.kept_rank(d), like, seed + i, energy)
        if dims.kept_rank(d)
        else DenseBlock(d, like, storage, inverse)
        for i, d in enumerate(dims.blocks)
    ]


def means(factors: Sequence[Factor], side_F: Tensor) -> Tensor:
    """Mean eigenvalues of many factors' averages at once; see `Factor.mean`.

    Args:
        factors: F of them, at least one.
        side_F: their sides, on their device.

    Shapes:
        result: [F].
    """
    trace_F = torch.stack([factor.trace() for factor in factors])
    weight_F = torch.stack([factor.weight for factor in factors])
    return trace_F / (weight_F.clamp_min(kron.TINY) * side_F)


class Factor:
    """A factor as blocks along its diagonal.

    Args:
        dims: its description.
        like: gives device and the dtype to compute in.
        blocks: on the diagonal, of the sides that `dims` tells.

    Attributes:
        weight: running count behind the sums, scalar tensor.
        ready: the factorization is a usable one, boolean scalar tensor.
        refreshed_at: step of the last factorization, None before the first.
    """

    def __init__(self, dims: FactorDims, like: Tensor, blocks: Sequence[Block]) -> None:
        self.dims = dims
        self.blocks = list(blocks)
        self.weight = like.new_zeros(())
        self.ready = torch.zeros((), dtype=torch.bool, device=like.device)
        self.refreshed_at: int | None = None

    @property
    def bases(self) -> list[Tensor | None]:
        """Per block the basis to sketch the next window with; None where it is dense."""
        return [block.basis for block in self.blocks]

    def average(self, found: FactorSum, count: Tensor, drop: Tensor, decay: float) -> None:
        """S <- decay S + sum and N <- decay N + count, in place; nothing where `drop` or nothing was counted."""
        take = ~(drop | (count <= 0))
        keep = torch.where(take, torch.full_like(self.weight, decay), torch.ones_like(self.weight))
        self.weight.mul_(keep).add_(torch.where(take, count, torch.zeros_like(count)))
        if found.parts:
            for block, part, trace in zip(self.blocks, found.parts, found.traces, strict=True):
                block.average(part, trace, keep, take)

    def mean(self) -> Tensor:
        """Mean eigenvalue of the average, a scalar tensor; 0 before anything was measured."""
        return self.trace() / (self.weight.clamp_min(kron.TINY) * self.dims.side)

    def trace(self) -> Tensor:
        """Of the running sum, a scalar tensor."""
        traces = [block.trace() for block in self.blocks]
        return traces[0] if len(traces) == 1 else torch.stack(traces).sum()

    def jobs(self, shift: Tensor, jitter: float = 0.0, dtype: torch.dtype | None = None) -> list[Job]:
        """Factorizations of average + shift I, block by block, on copies: they may run later and elsewhere.

        Args:
            shift: scalar tensor.
            jitter: relative, on top of it.
            dtype: to factorize in; None for that of the state.

        Returns:
            One a block; what they return goes to `keep`.
        """
        scale = 1 / self.weight.clamp_min(kron.TINY)
        return [block.job(scale, shift, jitter, dtype or self.weight.dtype) for block in self.blocks]

    def keep(self, found: list[list[Tensor]], usable: Tensor) -> Tensor:
        """Take over a factorization, as a whole or not at all.

        Args:
            found: what the `jobs` returned.
            usable: boolean scalar tensor, there is something to factorize.

        Returns:
            Whether it failed although it was usable, a boolean scalar tensor.
        """
        failed = torch.stack([one[1] for one in found]).any()
        good = usable & ~failed
        for block, one in zip(self.blocks, found, strict=True):
            block.keep(one, good)
        self.ready.copy_(self.ready | good)
        return usable & failed

    def solve(self, v_DR: Tensor) -> Tensor:
        """(average + shift I)^-1 V with the kept factorization.

        Shapes:
            v_DR, result: [D, R].
        """
        if len(self.blocks) == 1:
            return self.blocks[0].solve(v_DR)
        pieces = torch.split(v_DR, list(self.dims.blocks), dim=0)
        return torch.cat([block.solve(piece) for block, piece in zip(self.blocks, pieces, strict=True)])

    @property
    def wire_size(self) -> int:
        """Numbers of the factorization on the wire."""
        return sum(block.wire_size for block in self.blocks) + 1

    def to_wire(self) -> Tensor:
        """The factorization, and whether it is usable, as a vector."""
        parts = [block.to_wire(self.weight) for block in self.blocks]
        return torch.cat([*parts, self.ready.to(self.weight.dtype).reshape(1)])

    def from_wire(self, wire: Tensor) -> None:
        """Take over a factorization that another rank made."""
        sizes = [block.wire_size for block in self.blocks]
        *parts, ready = torch.split(wire, [*sizes, 1])
        for block, part in zip(self.blocks, parts, strict=True):
            block.from_wire(part)
        self.ready.copy_(ready[0] > 0)

    def matrix(self) -> Tensor:
        """The average as a full matrix, [D, D]; for tests and inspection."""
        sums: Tensor = torch.block_diag(*[block.sum() for block in self.blocks])  # type: ignore[no-untyped-call]
        return sums / self.weight.clamp_min(kron.TINY)

    def state(self) -> dict[str, Tensor]:
        """All tensors, by names that start with the key."""
        out = {f"{self.dims.key}/weight": self.weight, f"{self.dims.key}/ready": self.ready}
        for index, block in enumerate(self.blocks):
            out |= {f"{self.dims.key}/{index}/{name}": value for name, value in block.state().items()}
        return out
