"""A block of a Kronecker factor that is kept as its running average and its eigenvectors.

What is known along the eigenvectors (the second moments of `dsso.optim.ekfac`) is carried over when they change: as
a variance is, by the squared entries of the rotation between the two bases.

Legend of shape suffixes: `D` side, `R` columns of a right-hand side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsso.linalg import kron, roots, triangle
from dsso.linalg.smooth import neighbours_mean
from dsso.optim._factor import Job

OFFSET = 0.1
"""Multiple of the mean eigenvalue that is added to eigenvalues where their ratios are looked at: what lies far below
the mean is told apart by nothing."""


class EigenBlock:
    """A block as a running sum above the diagonal of a square, eigenvalues and eigenvectors of the average.

    Args:
        side: of the block.
        like: gives device and dtype.
        width: of the averages over neighbouring eigenvectors, on the scale of the logarithm of the eigenvalue; 0: none.

    Attributes:
        values_D: eigenvalues, ascending.
        vectors_DD: the eigenvectors, columns in the order of their eigenvalues; the identity before the first.
        shift: the factor's share of the damping.
        carried: views [D, R] of what is known along the eigenvectors, written when they change.
    """

    basis: Tensor | None = None
    parts = 4
    """Tensors that a job returns."""

    def __init__(self, side: int, like: Tensor, width: float) -> None:
        self.square_DD = like.new_zeros(side, side)
        self.diagonal_D = like.new_zeros(side)
        self.values_D = like.new_zeros(side)
        self.vectors_DD = torch.eye(side, dtype=like.dtype, device=like.device)
        self.shift = like.new_ones(())
        self.width = width
        self.carried: list[Tensor] = []

    def trace(self) -> Tensor:
        """Of the running sum."""
        return self.diagonal_D.sum()

    def average(self, part: Tensor, _trace: Tensor | None, keep: Tensor, take: Tensor) -> None:
        """S <- keep S + part where `take`."""
        triangle.accumulate_(self.square_DD, self.diagonal_D, part, keep, take)

    def job(self, scale: Tensor, shift: Tensor, jitter: float, dtype: torch.dtype) -> Job:
        """Eigenvalues of scale S, whether that failed, eigenvectors, and the shift, which changes neither."""
        sum_DD = self.sum() * scale
        shift = shift.clone()

        def decompose() -> list[Tensor]:
            w_D, v_DD, failed = roots.eigh(sum_DD)
            flag = torch.tensor(failed, device=sum_DD.device)
            return [w_D.clamp_min(0.0).to(sum_DD.dtype), flag, v_DD.to(sum_DD.dtype), shift]

        return decompose

    def keep(self, found: list[Tensor], good: Tensor) -> None:
        """Take over what the job found, where `good`, and carry over what belongs to the eigenvectors."""
        values_D, _, vectors_DD, shift = found
        turn_DD = (vectors_DD.mT @ self.vectors_DD).square()
        # The same once more, after a step whose statistics were dropped or from another rank, is no turn at all.
        moved = good & (vectors_DD != self.vectors_DD).any()
        for view_DR in self.carried:
            new_DR = turn_DD @ self.averaged(view_DR)
            view_DR.copy_(torch.where(moved, new_DR, view_DR))
        self.values_D.copy_(torch.where(good, values_D, self.values_D))
        self.vectors_DD.copy_(torch.where(good, vectors_DD, self.vectors_DD))
        self.shift.copy_(torch.where(good, shift, self.shift))

    def averaged(self, s_DR: Tensor) -> Tensor:
        """Numbers that belong to eigenvectors, as averages over neighbours.

        Shapes:
            s_DR, result: [D, R].
        """
        if not self.width:
            return s_DR
        offset = (OFFSET * self.values_D.mean()).clamp_min(kron.TINY)
        return neighbours_mean(s_DR.mT, (self.values_D + offset).log(), self.width).mT

    def turned(self, v_DR: Tensor) -> Tensor:
        """Q^T V."""
        return self.vectors_DD.mT @ v_DR

    def back(self, v_DR: Tensor) -> Tensor:
        """Q V."""
        return self.vectors_DD @ v_DR

    def solve(self, v_DR: Tensor) -> Tensor:
        """(S + shift)^-1 V."""
        return self.back(self.turned(v_DR) / (self.values_D + self.shift).unsqueeze(1))

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {
            "sum": self.square_DD,
            "diagonal": self.diagonal_D,
            "values": self.values_D,
            "vectors": self.vectors_DD,
            "shift": self.shift,
        }

    @property
    def wire_size(self) -> int:
        """Numbers of the factorization on the wire."""
        return self.vectors_DD.numel() + self.values_D.numel() + 1

    def to_wire(self, like: Tensor) -> Tensor:
        """The factorization as a vector."""
        parts = [self.vectors_DD.reshape(-1), self.values_D, self.shift.reshape(1)]
        return torch.cat(parts).to(like.dtype)

    def from_wire(self, wire: Tensor) -> None:
        """Take over a factorization that another rank made."""
        side = self.values_D.numel()
        vectors, values_D, shift = torch.split(wire, [side * side, side, 1])
        good = torch.ones((), dtype=torch.bool, device=wire.device)
        self.keep([values_D, good, vectors.view(side, side), shift[0]], good)

    def sum(self) -> Tensor:
        """The running sum as a full matrix, [D, D]."""
        return triangle.symmetric(self.square_DD, self.diagonal_D, self.diagonal_D.dtype)
