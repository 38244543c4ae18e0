"""Parameters that all methods on blocks of matrices share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsso.optim._gradient_config import GradientConfig
from dsso.schedule import Interval


class MatrixConfig(GradientConfig):
    """What every method on blocks of matrices takes."""

    refresh_interval: Interval = Interval(((0, 1), (10, 10)))
    """Steps between two refreshes of a block's preconditioner, with early repeats; null in a segment: never again."""
    stagger: bool = True
    """Spread refreshes over their interval, block by block."""
    block_side: int = Field(default=1024, ge=2)
    """Longest side of a block; parameters are cut as they are before any sharding."""
    sides: Literal["auto", "all"] = "auto"
    """Sides of a block that are preconditioned; `auto`: of a long and narrow one the short side only."""
    aspect: float = Field(default=8.0, ge=1)
    """With `sides: auto`: a side that is so many times longer than the shortest is not preconditioned."""
    embeddings: bool = False
    """Take embeddings and the output head as well; else they go to the base method."""

    def kept_sides(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Dimensions of a block that have a preconditioner."""
        if self.sides == "all":
            return tuple(range(len(sides)))
        return tuple(dim for dim, side in enumerate(sides) if side <= self.aspect * min(sides))
