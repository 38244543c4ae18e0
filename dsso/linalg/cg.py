"""Conjugate gradients whose products somebody else makes: vectors in pieces, scalars on the device, a fixed course.

    (A + shift) x = b,   A symmetric and positive semi-definite

The solver hands out a direction and is given A times it, so that a product may be whatever it takes: passes through a
model over many ranks. It never asks the device: a direction of no curvature, a product that is not finite and a
residual that is small enough end the course by multiplying with zero from then on.

With a preconditioner the first iteration goes along b all the same, because what is added to A and the preconditioner
itself may depend on the curvature there; from what it leaves the preconditioned course begins.

Source: Hestenes and Stiefel 1952; as a step of Newton's method: Martens 2010, *Deep learning via Hessian-free
optimization*, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Dot = Callable[[Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]], Tensor]
"""Inner products of pairs of vectors in pieces, summed over all ranks: one number a pair, [P]."""

Precondition = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Pieces of M^-1 times a vector in pieces, M near to A + shift, symmetric and positive definite."""
Prepare = Callable[[Tensor, Tensor], Precondition]
"""Makes one from the shift and the Rayleigh quotient of A along b, scalars."""


class ConjugateGradients:
    """One solve.

    Args:
        solution: pieces of x, overwritten; it starts at zero.
        right: pieces of b.
        dot: inner products.
        shift: what is added to A; with `relative`, times the Rayleigh quotient of A along b.
        relative: see `shift`.
        tolerance: on ||r|| / ||b||; from there on nothing changes.
        prepare: makes the preconditioner after the first product; None: there is none.

    Attributes:
        direction: pieces of what the next product is wanted of.
        residual: pieces of r = b - (A + shift) x.
        shift: a scalar on the device, known from the first product on.
        taken: iterations that changed something, a scalar on the device.
    """

    def __init__(
        self,
        solution: Sequence[Tensor],
        right: Sequence[Tensor],
        dot: Dot,
        shift: float = 0.0,
        relative: bool = False,
        tolerance: float = 0.0,
        prepare: Prepare | None = None,
    ) -> None:
        self.solution, self._dot, self._tolerance = list(solution), dot, tolerance
        torch._foreach_zero_(self.solution)
        self.residual = [piece.clone() for piece in right]
        self.direction = [piece.clone() for piece in right]
        (self._rr,) = dot([(self.residual, self.residual)]).unbind()
        self._bb = self._rz = self._rr
        self._prepare = prepare
        self._precondition: Precondition | None = None
        self._relative: float | None = shift if relative else None
        self.shift = torch.full_like(self._rr, shift)
        self.taken = torch.zeros_like(self._rr)
        self._alive = self._rr > 0

    @property
    def reached(self) -> Tensor:
        """||r|| / ||b||, a scalar on the device; 0 where b is 0."""
        return (self._rr / self._bb.clamp_min(torch.finfo(self._bb.dtype).tiny)).sqrt()

    def feed(self, product: Sequence[Tensor], good: Tensor | None = None) -> None:
        """One iteration.

        Args:
            product: pieces of A times `direction`; overwritten.
            good: boolean scalar: false where the product was lost, which ends the course.
        """
        if good is not None:
            self._alive = self._alive & good
        curvature, length = self._dot([(self.direction, product), (self.direction, self.direction)]).unbind()
        if self._relative is not None:
            self.shift = torch.nan_to_num(self._relative * curvature / length, 0.0, 0.0, 0.0).clamp_min(0.0)
            self._relative = None
        bent = curvature + self.shift * length
        self._alive = self._alive & torch.isfinite(bent) & (bent > 0)
        step = torch.where(self._alive, self._rz / bent, torch.zeros_like(bent))
        for x, r, p, ap in zip(self.solution, self.residual, self.direction, product, strict=True):
            # Zero times what is not finite is not zero.
            ap.copy_(torch.where(self._alive, torch.addcmul(ap, p, self.shift), torch.zeros_like(ap)))
            x.addcmul_(p, step)
            r.addcmul_(ap, -step)
        begun = self._prepare is None
        if self._prepare is not None:
            self._precondition = self._prepare(
                self.shift, torch.nan_to_num(curvature / length, 0.0, 0.0, 0.0)
            )
            self._prepare = None
        z: Sequence[Tensor] = self.residual
        pairs = [(self.residual, z)]
        if self._precondition is not None:
            z = self._precondition(self.residual)
            pairs.append((self.residual, z))
        found = self._dot(pairs).unbind()
        rr, rz = found[0], found[-1]
        # The direction behind a new beginning owes nothing to the one before it.
        ratio = torch.where(self._alive, rz / self._rz, torch.zeros_like(rz)) * begun
        self.taken = self.taken + self._alive
        self._rr = torch.where(self._alive, rr, self._rr)
        self._rz = torch.where(self._alive, rz, self._rz)
        self._alive = self._alive & (rr > self._tolerance**2 * self._bb) & (rz > 0)
        for p, one in zip(self.direction, z, strict=True):
            p.copy_(torch.where(self._alive, torch.addcmul(one, p, ratio), p))
