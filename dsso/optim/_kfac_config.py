"""Parameters of K-FAC, as a recipe writes them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dsso.optim._kronecker_config import KroneckerConfig

RARE = 10
"""Interval from which on `apply = "auto"` holds refreshes for rare."""


class Config(KroneckerConfig):
    """Parameters of K-FAC (`optimizer.params`)."""

    title: ClassVar[str] = "K-FAC"

    low_rank: int | None = Field(default=None, ge=1)
    """Keep sides above `low_rank_above` as so many leading eigenpairs and a mean tail; null: all dense."""
    low_rank_energy: float | None = Field(default=None, gt=0, le=1)
    """With `low_rank`: use the fewest leading ones of them that hold this share of the trace; null: all."""
    low_rank_above: int = Field(default=256, ge=1)
    """With `low_rank`: sides up to this stay dense."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """Type in which dense factors and their factorizations are kept."""
    apply: Literal["auto", "solve", "inverse"] = "auto"
    """How dense factors act: by triangular solves, by products with inverses; auto: by device and interval."""

    @model_validator(mode="after")
    def _energy_of_something(self) -> Config:
        if self.low_rank_energy is not None and self.low_rank is None:
            raise ValueError("low_rank_energy chooses among the pairs of low_rank, which is not set")
        return self

    @model_validator(mode="after")
    def _inverse_in_full(self) -> Config:
        if self.apply == "inverse" and self.storage != "float32":
            raise ValueError(
                'apply = "inverse" needs storage = "float32": rounded to bfloat16 an inverse may be indefinite'
            )
        return self

    def kept_rank(self, sides: tuple[int, ...]) -> int:
        """Eigenpairs that a factor with blocks of these sides is kept as; 0: it is dense."""
        low = self.low_rank or 0
        return low if low and min(sides) > max(self.low_rank_above, low) else 0

    def keeps_inverses(self, on_accelerator: bool) -> bool:
        """Whether dense factors are kept as inverses.

        A triangular solve with a few columns is a chain of small steps, which an accelerator waits for, where a
        product is one; a CPU reads the matrix in both. An inverse costs twice as much again as the Cholesky
        factor that it is made from, so it has to serve for some steps.

        Args:
            on_accelerator: the factors do not live in the host's memory.
        """
        if self.apply != "auto":
            return self.apply == "inverse"
        last = self.inverse_interval.segments[-1][1]
        rare = last is None or last >= RARE
        return on_accelerator and rare and self.storage == "float32"
