"""PSGD with Kronecker factors: a preconditioner that is learnt step by step to whiten the gradient.

For a block with averaged gradient G of sides d_1 .. d_k, upper triangular Q_i of those that are preconditioned, and a
fresh V of standard normal numbers,

    A    = (G + e |G| V) x_1 Q_1 ... x_k Q_k             |G|: root mean square
    B    = V x_1 Q_1^-T ... x_k Q_k^-T
    Q_i <- Q_i - mu / |A_i A_i^T + B_i B_i^T| triu(A_i A_i^T - B_i B_i^T) Q_i        (unfoldings along side i)
    U    = G x_1 Q_1^T Q_1 ... x_k Q_k^T Q_k

which is relative gradient descent of c(P) = E[g^T P g + v^T P^-1 v] over P = (Q^T Q) (x) ..., least where
P E[g g^T] P = I. That is the whitening form. In the Newton form V is a probe of random signs over all parameters that
are taken and H V, what the gradient answers to a displacement along it, stands in the place of G: c is least at
P = |H|^-1.

Sources: Li 2018, *Preconditioned stochastic gradient descent* (criterion, fitting on Lie groups); Li 2019,
*Preconditioner on matrix Lie group for SGD* (Kronecker factors, Newton pairs); Pooladzandi, Li 2024,
*Curvature-informed SGD via general purpose Lie-group preconditioners* (whitening; updates at a falling rate).
Deviations: instead of an update with probability p one every 1 / p steps, spread over the blocks, so that no step is
longer than another; the first gradient sets the scale of Q, so that whitening does not begin with a search for it; e is
relative, because a direction that has no gradient would otherwise be amplified without end; of a long and narrow block
only the short side is preconditioned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dsso.clip import ClipMode
from dsso.linalg.kron import TINY
from dsso.optim._blocks import BlockCost, MatrixBlocks, Take, fresh
from dsso.optim._estimating import Estimate, EstimatingMethod, HessianProduct, Pieces, State, probe_of
from dsso.optim._estimation import Estimation
from dsso.optim._gradient_config import HessianConfig
from dsso.optim._matrix import MatrixMethod
from dsso.optim._matrix_config import MatrixConfig
from dsso.optim._refresh import Stagger
from dsso.optim._tensors import TensorBlock
from dsso.optim._unfold import along_upper, per_block, rms, unfolded, upper_gram
from dsso.parallel import noise
from dsso.parallel.fragments import FragmentExchange
from dsso.schedule import Interval

__all__ = ["Config", "Method", "fit"]


class Config(HessianConfig, MatrixConfig):
    """Parameters of PSGD (`optimizer.params`)."""

    hessian: ClassVar[str] = "form = newton"

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate, of the size of Adam's or a little less."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """m <- momentum m + u on clipped updates, on top of `beta1`."""
    clip: ClipMode = "none"
    """What `tau` bounds: nothing, the gradient norm (`pre`) or the norm of the update (`post`), which of a whitened
    gradient is about the root of the number of elements."""
    refresh_interval: Interval = Interval(((0, 1), (500, 2), (1200, 4), (1900, 8), (2600, 16), (3500, 33)))
    """Steps between two updates of a block's preconditioner: the rate of the published probabilities, 1 at first and
    0.03 in the end."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the averaged gradient that is whitened; 0: the gradient itself."""
    form: Literal["whitening", "newton"] = "whitening"
    """What Q learns: to whiten the gradient, or from products with the Hessian to invert its size. Those take windows
    of their own before every refresh, and all blocks are refreshed together."""
    precondition_lr: float = Field(default=0.1, gt=0, lt=1)
    """mu, the step of the preconditioner, relative to the norm of what it is made of. Below 1 Q stays invertible."""
    damping: float = Field(default=1e-3, ge=0)
    """e: numbers of this size relative to the gradient are added to it where Q learns."""
    max_rms: float | None = Field(default=1.1, gt=0)
    """Bound on the root mean square of a block's update; null: none."""

    @property
    def estimates_often(self) -> float:
        """Before every refresh, of all blocks together."""
        return self.refresh_interval.often

    def estimation(self, scores: int) -> Estimation:
        """A product with the Hessian, brought to the owners."""
        gathers = self.estimates_often if self.takes_hessian else 0.0
        return super().estimation(scores) + Estimation(gathers=gathers)


def fit(factors: list[Tensor], dims: tuple[int, ...], h: Tensor, v: Tensor, rate: float) -> list[Tensor]:
    """One step of the factors towards c(P) = h^T P h + v^T P^-1 v at its least.

    With v the noise and h a gradient they learn to whiten; with v a displacement and h the change of the gradient that
    it causes (a Hessian product), to invert the curvature.

    Args:
        factors: upper triangular, [D, D] each.
        dims: sides of `h` that they belong to.
        h: gradient or Hessian product.
        v: of its shape.
        rate: mu.

    Returns:
        New factors, balanced: their product is what counts, so all get the same largest entry.
    """
    a, b = h.unsqueeze(0), v.unsqueeze(0)
    for q_DD, dim in zip(factors, dims, strict=True):
        a = along_upper(q_DD.unsqueeze(0), a, dim)
        b = _solved(q_DD, b, dim)
    out = []
    for q_DD, dim in zip(factors, dims, strict=True):
        a_DN, b_DN = unfolded(a, dim)[0], unfolded(b, dim)[0]
        length = _norm(a_DN, b_DN)
        # Both are upper triangular, and so is their product.
        between_DD = upper_gram(a_DN).sub_(upper_gram(b_DN)).triu_()
        step_DD = along_upper(between_DD.unsqueeze(0), q_DD.unsqueeze(0), 0)[0]
        out.append(q_DD - step_DD * (rate / length.clamp_min(TINY)))
    sizes = torch.stack([q_DD.abs().max() for q_DD in out])
    even = sizes.log().mean().exp()
    return [q_DD * (even / size) for q_DD, size in zip(out, sizes.unbind(), strict=True)]


def _solved(q_DD: Tensor, x: Tensor, dim: int) -> Tensor:
    """Q^-T along a side of one tensor, [1, ...]."""
    moved = x.movedim(dim + 1, 1)
    flat_DN = moved.reshape(moved.shape[1], -1)
    solved_DN: Tensor = torch.linalg.solve_triangular(q_DD.mT, flat_DN, upper=False)
    return solved_DN.view(moved.shape).movedim(1, dim + 1)


def _norm(a_DN: Tensor, b_DN: Tensor, rounds: int = 3) -> Tensor:
    """Largest eigenvalue of A A^T + B B^T, from below, within a factor of about two.

    By power iteration from a fixed vector.
    """
    generator = torch.Generator(a_DN.device).manual_seed(0)
    y_D = torch.randn(len(a_DN), generator=generator, dtype=a_DN.dtype, device=a_DN.device)
    for _ in range(rounds):
        y_D = y_D / y_D.norm().clamp_min(TINY)
        y_D = a_DN @ (a_DN.mT @ y_D) + b_DN @ (b_DN.mT @ y_D)
    length: Tensor = y_D.norm()
    return length


class Blocks(MatrixBlocks):
    """Triangular factors of the sides, and the averaged gradient."""

    def __init__(self, count: int, sides: tuple[int, ...], config: Config, like: Tensor) -> None:
        super().__init__(count, sides, config, like)
        self._config = config
        self._kept = config.kept_sides(sides)
        self._factors = [self.eye(sides[dim]) for dim in self._kept]
        self._mean = self.zeros(*sides) if config.beta1 else None
        self._count, self._turns = self.zeros(), self.zeros()
        self._latest: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        """Of the Newton form: for each block the probe and what the Hessian makes of it."""

    @staticmethod
    def cost(sides: tuple[int, ...], config: Any) -> BlockCost:
        """A square a side; solves and products for an update of Q, two products a side for a step."""
        whole = math.prod(sides)
        kept = [sides[dim] for dim in config.kept_sides(sides)]
        return BlockCost(
            elements=sum(side * side for side in kept) + bool(config.beta1) * whole + 2,
            refresh=sum(2.5 * side * whole + side**3 / 3 for side in kept),
            step=sum(2.0 * side * whole for side in kept),
        )

    def average(self, gradient_KS: Tensor, take: Take) -> None:
        """M."""
        self._count.add_(take.count)
        if self._mean is None:
            self._latest = gradient_KS
            return
        self._mean.mul_(take.keep(self._config.beta1)).add_(gradient_KS, alpha=fresh(self._config.beta1))
        bias = (1 - self._config.beta1**self._count).clamp_min(TINY)
        self._latest = self._mean / per_block(bias, self._mean)

    def refresh(self, index: int) -> bool:
        """One update of the factors; all of them, or none."""
        config = self._config
        newton = config.form == "newton"
        if newton:
            v, g = self.pairs[index]
        else:
            assert self._latest is not None
            g = self._latest[index]
        level = g.square().mean().sqrt()
        if not level > TINY:
            # No loss has reached the parameter yet, or its gradient is zero for once: nothing to learn from.
            return bool(~level.isfinite())
        factors = [q_KDD[index] for q_KDD in self._factors]
        if not self.usable[index]:
            # P of a gradient of that size is its inverse: the sides share it.
            scale = level ** (-0.5 / len(factors))
            factors = [q_DD * scale for q_DD in factors]
        turns = int(self._turns[index])
        if not newton:
            generator = torch.Generator(g.device).manual_seed((self.seeds[index] << 24) + turns)
            v = torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device)
        found = fit(factors, self._kept, g + config.damping * level * v, v, config.precondition_lr)
        if not torch.stack([q_DD.isfinite().all() for q_DD in found]).all():
            return True
        for mine_KDD, q_DD in zip(self._factors, found, strict=True):
            mine_KDD[index].copy_(q_DD)
        self._turns[index] += 1
        self.usable[index] = True
        return False

    def act(self, gradient_KS: Tensor, step: int) -> Tensor:
        """The whitened average; nothing before there are factors."""
        # Nothing of the size of a gradient outlives the step.
        update, self._latest = self._latest, None
        if update is None or not any(self.usable):
            return torch.zeros_like(gradient_KS)
        for q_KDD, dim in zip(self._factors, self._kept, strict=True):
            update = along_upper(q_KDD, along_upper(q_KDD, update, dim), dim, transposed=True)
        if self._config.max_rms is not None:
            update = update * (self._config.max_rms / rms(update).clamp_min(TINY)).clamp_max(1.0)
        mask = self.mask()
        return update if mask is None else torch.where(mask, update, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """All state."""
        out = {"count": self._count, "turns": self._turns}
        out |= {f"factor{dim}": q_KDD for dim, q_KDD in zip(self._kept, self._factors, strict=True)}
        if self._mean is not None:
            out["mean"] = self._mean
        return out


class Method(MatrixMethod, EstimatingMethod):
    """PSGD on the matrices of a model; arguments as of `MatrixMethod`."""

    block = Blocks
    config: Config

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, model, device, rank, world_size, example)
        self.products, self.difference = config.products, config.difference
        self.displacement = torch.zeros((), device=device)
        self._product = HessianProduct()
        self._exchange: FragmentExchange | None = None
        self._answers: dict[str, Tensor] | None = None
        self._good = torch.ones((), dtype=torch.bool, device=device)
        self._probe: Sequence[Tensor] = ()
        self._of_step = self._had = -1
        self._again = False
        if config.form == "newton":
            self.probed = frozenset(self.owners)
            # One product is an estimate for all blocks.
            self._stagger = Stagger(dict.fromkeys(self.layout.costs, 1.0), False)

    # -- windows of estimation ------------------------------------------------------------------------------------

    def wants_estimate(self, step: int) -> Estimate | None:
        """The Hessian along a probe, before every refresh of the Newton form."""
        if self.config.form != "newton" or self._had == step:
            return None
        due = self._again or not self._steps or self._stagger.due(self.config.refresh_interval, step)
        if not due:
            return None
        return "hessian" if self.products == "double_backward" else "gradient_pair"

    def had_estimate(self, step: int) -> None:
        """Two windows are one estimate where differences are taken."""
        self._had, self._again = step, False

    def direction(self, pieces: Pieces, step: int) -> Sequence[Tensor]:
        """The probe of that step."""
        if self._of_step != step or not self._probe:
            self._of_step, self._probe = step, pieces.probe(self.config.probe_seed, step)
        return self._probe

    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, pieces: Pieces
    ) -> None:
        """Bring what the Hessian makes of the probe to the owners of the blocks."""
        found = self._product.take_in(self, gradients, take)
        if found is None:
            return
        if self._exchange is None:
            self._exchange = pieces.exchange(self.workers)
        self._answers, self._good, self._probe = pieces.at_workers(found[0], self._exchange), found[1], ()

    def begin_window(self, step: int, retry: bool) -> None:
        """Where a refresh was lost, which is known two steps later, another estimate is needed for one."""
        super().begin_window(step, retry)
        self._again = self._again or (retry and self._had < step - 1)

    def update(self, step: int, bad: Tensor | None) -> None:
        """Learn whether the gradients of this step are taken in."""
        self.need_estimate(step)
        super().update(step, bad)

    # -- the update -----------------------------------------------------------------------------------------------

    def _due(self, step: int) -> set[str]:
        """Blocks to be refreshed: in the Newton form all, where there is a product with the Hessian."""
        if self.config.form != "newton":
            return super()._due(step)
        if self._answers is None:
            return set()
        if not self._good:
            self._again = True
            return set()
        return set(self._places)

    def _refresh(
        self, blocks: Sequence[TensorBlock], state: MatrixBlocks, due: Collection[str], step: int
    ) -> int:
        """Renew the preconditioners that are due; how many failed."""
        assert isinstance(state, Blocks)
        if due and self._answers is not None:
            state.pairs = [self._pair(block) for block in blocks]
        failed = super()._refresh(blocks, state, due, step)
        state.pairs = []
        return failed

    def _pair(self, block: TensorBlock) -> tuple[Tensor, Tensor]:
        """The block's part of the probe, made again, and of what the Hessian makes of it."""
        assert self._answers is not None
        answer = self._answers[block.name]
        signs = torch.zeros_like(answer)
        direction = probe_of(self.config.probe_seed, block.name, self._of_step)
        noise.add(signs, signs, direction, 0, 1.0)
        return block.of(signs), block.of(answer)

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Take the gradients in, refresh what is due, and let the blocks act."""
        found = super().precondition(gradients)
        self._answers = None
        return found
