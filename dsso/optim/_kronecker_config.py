"""Parameters that methods with Kronecker factors of layers share, as a recipe writes them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dsso.curvature.hooks import Approximation
from dsso.linalg.kron import DampingMode
from dsso.optim._gradient_config import GradientConfig
from dsso.parallel.placement import Strategy
from dsso.schedule import Interval, ScalarSchedule, bounded


class KroneckerConfig(GradientConfig):
    """What K-FAC and its kin take."""

    title: ClassVar[str]
    """Name of the method in messages."""
    damped: ClassVar[bool] = True

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
    block_side: int | None = Field(default=8192, ge=1)
    """Cut wider sides into equal blocks along the diagonal of the factor; null: never."""
    max_side: int = Field(default=65536, ge=1)
    """Layers with a wider side go to the base method."""
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

    def kept_rank(self, sides: tuple[int, ...]) -> int:
        """Eigenpairs that a factor with blocks of these sides is kept as; 0: it is dense."""
        return 0
