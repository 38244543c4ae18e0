"""What estimates of curvature ask for beside the window that a step is taken from, as averages over many steps."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Estimation:
    """Of a step, on average over the last segments of a method's intervals.

    Attributes:
        windows: of estimation: passes forward and backward of the whole batch, and the reduction of its gradient.
        twice: those of them that differentiate the model twice, which is about as many operations again.
        forwards: forward passes of the whole batch without a backward pass.
        displacements: times that the weights are displaced and put back.
        directions: times that a vector is brought to all ranks whole.
        gathers: times that what a window comes to is brought to those who own the parameters.
    """

    windows: float = 0.0
    twice: float = 0.0
    forwards: float = 0.0
    displacements: float = 0.0
    directions: float = 0.0
    gathers: float = 0.0

    def __add__(self, other: Estimation) -> Estimation:
        """Both."""
        return Estimation(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
