"""Parameters of K-FAC, as a recipe writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsso.curvature.hooks import Approximation
from dsso.linalg.kron import DampingMode
from dsso.optim._gradient_config import GradientConfig
from dsso.parallel.placement import Strategy
from dsso.schedule import Interval, ScalarSchedule, bounded

RARE = 10
"""Interval from which on `apply = "auto"` holds refreshes for rare."""


class Config(GradientConfig):
    """Parameters of K-FAC (`optimizer.params`)."""

    damping: Annotated[ScalarSchedule, bounded(gt=0)] = 0.1
    """`relative`: lambda over the product of the factors' mean eigenvalues; `absolute`: lambda itself. A schedule."""
    damping_mode: DampingMode = "relative"
    """`relative`: scale-free, split by pi. `absolute`: lambda split by pi. `absolute_each`: lambda on both factors."""
    damping_floor: float = Field(default=1.0, ge=0)
    """`relative`: lambda gets this multiple of the model's mean curvature on top, the same for every layer."""
    factor_interval: Interval = Interval(((0, 1), (20, 10)))
    """Steps between two measurements of A and G, with early repeats; null in a segment: never again."""
    inverse_interval: Interval = Interval(((0, 1), (20, 100)))
    """Steps between two factorizations, with early repeats; null in a segment: never again."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the debiased averages of the statistics, per measurement."""
    fisher: Literal["empirical", "sampled", "forward_only"] = "empirical"
    """Labels behind G: the data's, drawn from the model (one more pass), or none (G = I)."""
    approximation: Approximation = "expand"
    """Weight sharing over tokens: each token an example, or mean of inputs and sum of gradients."""
    share_inputs: Literal["auto", "assume", "off"] = "auto"
    """One A for layers that read the same tensor: found by trying, also through dropout, or never."""
    token_stride: int = Field(default=1, ge=1)
    """Measure every k-th token of a sequence only (`expand`); 1: all."""
    low_rank: int | None = Field(default=None, ge=1)
    """Keep sides above `low_rank_above` as so many leading eigenpairs and a mean tail; null: all dense."""
    low_rank_energy: float | None = Field(default=None, gt=0, le=1)
    """With `low_rank`: use the fewest leading ones of them that hold this share of the trace; null: all."""
    low_rank_above: int = Field(default=256, ge=1)
    """With `low_rank`: sides up to this stay dense."""
    block_side: int | None = Field(default=8192, ge=1)
    """Cut wider sides into equal blocks along the diagonal of the factor; null: never."""
    max_side: int = Field(default=65536, ge=1)
    """Layers with a wider side go to the base method."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """Type in which dense factors and their factorizations are kept."""
    apply: Literal["auto", "solve", "inverse"] = "auto"
    """How dense factors act: by triangular solves, by products with inverses; auto: by device and interval."""
    stagger: bool = True
    """Spread measurements and factorizations over their intervals, factor by factor."""
    async_delay: int = Field(default=0, ge=0)
    """Factorize in the background and use the result exactly so many steps later; 0: at once."""
    strategy: Strategy = "memory_optimal"
    """Who applies a layer's factors: its owner, every rank, or a fraction of the ranks."""
    grad_worker_fraction: float = Field(default=0.5, gt=0, le=1)
    """`hybrid_optimal`: fraction of the ranks that apply a layer's factors."""
    bucket_mb: float = Field(default=25.0, gt=0)
    """Megabytes (1e6 bytes) of statistics in a message."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of statistics on the wire; counts are always exact."""
    overlap: bool = True
    """Send a factor's statistics as soon as the backward pass is through with it."""
    accumulate: Literal["rank", "owner"] = "rank"
    """Sums of a window of several micro-batches: on every rank up to the last pass, or sent to owners after each."""

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
