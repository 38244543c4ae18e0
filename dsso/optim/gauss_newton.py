"""Gauss-Newton steps without a matrix: (G + lambda I) u = g by conjugate gradients, on any engine.

    g        gradient of the batch
    G p      a window of the same batch for each product, see `dsso.engines.estimates`
    lambda   `damping`, by default times c = g^T G g / g^T g, the curvature along the gradient
    u        after `iterations` products, or when ||g - (G + lambda I) u|| <= `tolerance` ||g||
    M        preconditioner: G_layer + lambda I on layers whose block of G is formed, (c + lambda) I elsewhere

Nothing of G is kept from one step to the next: the batch has to be large enough to be worth its own curvature. Vectors
lie in pieces beside the weights, sharded as they are. With `curvature: sampled` G is that of one draw of labels from
the model for each step, as cheap and less exact; where losses are cross entropies or squares its mean is the true
Fisher matrix, and equals G.

Blocks are formed without approximation, in passes of their own (`dsso.curvature.layer_blocks`), and kept whole on every
rank while a step is solved for, so they are for layers of few parameters: heads, narrow adapters.

Sources: Schraudolph 2002; Martens 2010, *Deep learning via Hessian-free optimization*, whose preconditioner is a
diagonal. Deviations: damping relative to the curvature along the gradient; no backtracking over iterates, no line
search (`clip` and `tau` bound the step as for all methods); blocks of small layers, or nothing, for a preconditioner;
no warm start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dsso.curvature.layer_blocks import LayerBlocks, size, small_layers
from dsso.curvature.layers import KroneckerLayer
from dsso.errors import RecipeError
from dsso.linalg.cg import ConjugateGradients, Precondition
from dsso.optim._elementwise import ElementwiseConfig, ElementwiseMethod
from dsso.optim._estimating import Estimate, Pieces, State
from dsso.optim._estimation import Estimation
from dsso.optim._gradient_config import Products
from dsso.optim.base import state_like
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred

__all__ = ["Config", "Method"]

STEP = "gauss_newton_u"
"""Name under which u lies in the optimizer's state."""


class Config(ElementwiseConfig):
    """Parameters of Gauss-Newton (`optimizer.params`)."""

    kept: ClassVar[tuple[str, ...]] = (STEP,)

    damped: ClassVar[bool] = True

    lr: float = Field(default=0.5, gt=0)
    """Learning rate; 1 is the full step of the quadratic model."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """m <- momentum m + u on clipped steps."""
    damping: float = Field(default=0.01, gt=0)
    """lambda, added to the diagonal of G; relative or absolute, see `damping_kind`."""
    damping_kind: Literal["relative", "absolute"] = "relative"
    """`relative`: times g^T G g / g^T g of the batch."""
    iterations: int = Field(default=8, ge=1, le=1000)
    """Most products with G a step, each a window of the same batch."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """Residual over gradient at which the solve ends; known one product late. 0: always `iterations` products, since
    what lies at the bound by rounding ends earlier on one engine than on another."""
    curvature: Literal["exact", "sampled"] = "exact"
    """Curvature of the losses at the scores: exact, or one draw of labels from the model."""
    products: Products = "difference"
    """J p from scores at two displaced weights (`difference`, two forward passes, any engine, fp32 only) or from two
    reverse passes (`double_backward`, exact, not with weights that are sharded)."""
    difference: float = Field(default=1e-3, gt=0, le=0.1)
    """Length of the displacement over 1 + the length of all weights that are taken."""

    block_parameters: int | None = Field(default=None, ge=1, le=16384)
    """Linear layers with at most so many trained parameters have their block of G formed, in as many passes as a loss
    term has scores, and its damped inverse preconditions the solve; for tasks with one loss term an example. A block
    takes 8 bytes times the square of its parameters on every rank. null: none."""

    @model_validator(mode="after")
    def _blocks_are_used(self) -> Config:
        if self.block_parameters is not None and self.iterations == 1:
            raise ValueError(
                "block_parameters means nothing with iterations = 1, which goes along the gradient"
            )
        return self

    @property
    def working(self) -> int:
        """Residual and direction; what the preconditioner makes of the residual."""
        return 2 + (self.block_parameters is not None)

    def preconditioned(self, model: nn.Module, taken: Collection[str]) -> tuple[KroneckerLayer, ...]:
        """Layers whose block is formed.

        Args:
            model: the unwrapped model.
            taken: names of the parameters that the method takes.
        """
        most = self.block_parameters
        return () if most is None else small_layers(model, taken, most)

    def whole_bytes(self, model: nn.Module, taken: Collection[str]) -> int:
        """Of the blocks."""
        return sum(4 * size(layer) ** 2 for layer in self.preconditioned(model, taken))

    def estimation(self, scores: int) -> Estimation:
        """The gradient, all products that are allowed, and of blocks a window a score."""
        k, columns = float(self.iterations), 0.0 if self.block_parameters is None else float(scores)
        found = Estimation(windows=1 + k + columns)
        if self.products == "double_backward":
            found += Estimation(twice=k, directions=k)
        else:
            found += Estimation(forwards=2 * k, displacements=2 * k)
        return super().estimation(scores) + found

    @property
    def products_of_curvature(self) -> Products:
        """As `products` says."""
        return self.products


class Method(ElementwiseMethod):
    """Gauss-Newton on all matrices and vectors that are trained.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where state lives.
        rank, world_size, example: not used: nothing has an owner and nothing is measured in modules.

    Raises:
        RecipeError: a pattern of `exclude` is none, or everything is excluded, or no layer is small enough for the
            blocks that are asked for.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, model, device, "Gauss-Newton")
        self.config = config
        self.products, self.difference = config.products, config.difference
        self._layers = config.preconditioned(model, self.taken)
        if config.block_parameters is not None:
            if not self._layers:
                raise RecipeError(
                    "no linear layer is small enough for a block",
                    where="optimizer.params.block_parameters",
                    got=config.block_parameters,
                    remedy="raise it, or set it to null",
                )
            self.layer_blocks = LayerBlocks(model, self._layers, state_like(model, device))
        self._solve: ConjugateGradients | None = None
        self._reached = Deferred()
        self._windows, self._of_step, self._ended = 0, -1, False
        self._last = torch.zeros(3, device=device)
        self._unusable = torch.zeros((), device=device)

    # -- windows --------------------------------------------------------------------------------------------------

    def wants_estimate(self, step: int) -> Estimate | None:
        """The gradient, then the blocks, then products with what conjugate gradients make of them."""
        if step < self.config.warmup_steps or (step == self._of_step and self._ended):
            return None
        if step != self._of_step or self._windows == 0:
            return "gradient"
        if self.layer_blocks is not None and self.layer_blocks.measuring:
            return "ggn_column"
        return "ggn" if self.config.curvature == "exact" else "ggn_sampled"

    def had_estimate(self, step: int) -> None:
        """Count it; the residual of the product before it decides whether it was the last."""
        if step != self._of_step:
            self._of_step, self._windows, self._ended = step, 0, False
        blocks = self.layer_blocks
        if blocks is not None and blocks.active:
            blocks.end_window()
            return
        self._windows += 1
        if blocks is not None and self._windows == 1:
            blocks.open()
        before = self._reached.pop()
        if self._solve is not None:
            self._reached.push(self._solve.reached.reshape(1))
        small = before is not None and before[0] <= self.config.tolerance
        if self._windows > self.config.iterations or (small and self._windows > 1):
            self._end()

    def _end(self) -> None:
        solve = self._solve
        if solve is not None:
            self._last = torch.stack([solve.taken, solve.reached, solve.shift])
        self._solve, self._ended = None, True
        self._reached.pop()

    def direction(self, pieces: Pieces, step: int) -> Sequence[Tensor]:
        """Of the conjugate gradients."""
        assert self._solve is not None
        return self._solve.direction

    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, pieces: Pieces
    ) -> None:
        """Begin a solve with a gradient, or go on with a product; what the blocks are made of is in the layers."""
        if self.layer_blocks is not None and self.layer_blocks.active:
            return

        def dot(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
            sums = [
                sum((torch.dot(a, b) for a, b in zip(one, two, strict=True)), take.new_zeros((), dtype=kind))
                for one, two in pairs
            ]
            return collectives.all_sum(torch.stack(sums) * pieces.weight)

        kind = gradients[0].dtype if gradients else torch.float32
        clean = [torch.where(take, g, torch.zeros_like(g)) for g in gradients]
        if self._solve is None:
            relative = self.config.damping_kind == "relative"
            solution = [state[STEP] for state in states]
            self._solve = ConjugateGradients(
                solution,
                clean,
                dot,
                self.config.damping * self.damping_factor,
                relative,
                self.config.tolerance,
                None if self.layer_blocks is None else partial(self._preconditioner, pieces),
            )
            return
        self._solve.feed(clean, take)

    def _preconditioner(self, pieces: Pieces, shift: Tensor, level: Tensor) -> Precondition:
        """M^-1; a block that has no Cholesky factor counts as (c + lambda) I."""
        assert self.layer_blocks is not None
        factors = []
        for block_DD in self.layer_blocks.take():
            block_DD.diagonal().add_(shift)
            factors.append(torch.linalg.cholesky_ex(block_DD))
        rest = 1 / (level + shift).clamp_min(torch.finfo(level.dtype).tiny)
        good = [(failed == 0) & lower_DD.isfinite().all() for lower_DD, failed in factors]
        self._unusable = torch.stack([~one for one in good]).sum()
        names = frozenset(name for layer in self._layers for name in layer.parameters)

        def solved(whole: dict[str, Tensor]) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for layer, (lower_DD, _), usable in zip(self._layers, factors, good, strict=True):
                parts = [whole[name] for name in layer.parameters]
                r_D = torch.cat(parts)
                z_D = torch.cholesky_solve(r_D.unsqueeze(1), lower_DD).squeeze(1)
                z_D = torch.where(usable, z_D, r_D * rest)
                out |= zip(layer.parameters, torch.split(z_D, [len(part) for part in parts]), strict=True)
            return out

        return lambda vector: pieces.mapped(vector, names, solved, rest)

    # -- a window -------------------------------------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Have the blocks measured where the window is theirs."""
        if self.layer_blocks is not None:
            self.layer_blocks.active = self.wants_estimate(step) == "ggn_column"

    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """Set the scale of what the blocks are made of."""
        if self.layer_blocks is not None and self.layer_blocks.active:
            self.layer_blocks.before_backward(scale, terms)

    def measured_badly(self) -> Tensor:
        """Nothing of its own: all ranks have to agree that the gradient is finite."""
        return torch.zeros((), dtype=torch.bool, device=self.device)

    def act(self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor) -> list[Tensor]:
        """The solution; along the gradient in steps of first order, which have none."""
        return [torch.where(take, state[STEP], torch.zeros_like(state[STEP])) for state in states]

    def counts(self) -> Tensor:
        """None."""
        return torch.zeros(1, device=self.device)

    def note(self, counts: Tensor) -> None:
        """Nothing to learn."""

    # -- state ----------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Figures of the last solve.

        Keys: `cg_iterations` that changed something, `cg_residual` over the gradient, `damping` as added to G; with
        blocks, `unusable_blocks`, those that could not be factorized.
        """
        taken, reached, shift = self._last.tolist()
        out = {"cg_iterations": taken, "cg_residual": reached, "damping": shift}
        return out if self.layer_blocks is None else out | {"unusable_blocks": float(self._unusable)}

    def counters(self) -> dict[str, Any]:
        """Figures of the last solve."""
        return {"common": {"last": self._last.tolist()}, "owned": {}}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned."""
        self._last = torch.tensor(counters["common"]["last"], device=self.device)

    def close(self) -> None:
        """Take the hooks off the model."""
        if self.layer_blocks is not None:
            self.layer_blocks.remove()
