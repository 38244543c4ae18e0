"""EKFAC: K-FAC's eigenvectors with second moments of their own along them.

For a layer s = W [x; 1] with factors A = Q_A diag(a) Q_A^T and G = Q_G diag(g) Q_G^T as of `dsso.optim.kfac`, K-FAC
takes a_j g_i for the curvature along the direction (i, j) of the common eigenbasis. EKFAC measures it:

    M' = Q_G^T M Q_A,     S <- beta S + N M' o M',     n <- beta n + 1           every step; N: loss terms of the step
    U  = Q_G [ M' / (S / n + l) ] Q_A^T                                          l: K-FAC's damping of the pair, l_A l_G

With S one loss term at a time this is the diagonal of the Fisher in that basis, the best that any diagonal can be
(George et al. 2018, proposition 1). The gradient of a batch of N terms gives it up to the square of the mean gradient:
E[N M' o M'] = diagonal of the Fisher + (N - 1) E[M'] o E[M'].

When the eigenvectors are made anew S is carried over as a variance is, by the squared entries of the rotation between
the two bases. Eigenvectors whose damped eigenvalues lie close together are made of rounding, so the entries of S that
belong to them are averaged: `smoothing` is the distance, on the scale of the logarithm, at which that ends.

Source: George, Laurent, Bouthillier, Ballas, Vincent 2018 (S from the gradients of batches: its running average).
Deviations: damping split and measured as for K-FAC here; S debiased; carried over instead of kept entry by entry;
smoothing, without which a step depends on rounding errors (0: as published).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from dsso.linalg import kron
from dsso.optim._eigen import EigenBlock
from dsso.optim._factor import Factor
from dsso.optim._gradient_config import BaseConfig
from dsso.optim._kronecker import KroneckerMethod
from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim._layer import LayerPair
from dsso.optim.base import take_over
from dsso.parallel import collectives
from dsso.parallel.placement import FactorDims

__all__ = ["BaseConfig", "Config", "Method"]

FINEST = 0.03
"""Smallest smoothing."""


class Config(KroneckerConfig):
    """Parameters of EKFAC (`optimizer.params`)."""

    title: ClassVar[str] = "EKFAC"

    damping_mode: Literal["relative", "absolute"] = "relative"
    """`relative`: lambda over the product of the factors' mean eigenvalues; `absolute`: lambda itself."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels behind G, and so behind the eigenvectors: the data's, or drawn from the model (one more pass)."""
    moment_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the debiased average of the second moments, per step."""
    smoothing: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Second moments along eigenvectors whose damped eigenvalues differ by less than about this share are averaged; 0:
    never; else at least 0.03."""

    @field_validator("smoothing")
    @classmethod
    def _not_too_fine(cls, smoothing: float) -> float:
        # The logarithms of a factor's damped eigenvalues lie within 14, and neighbours_mean goes so many widths far.
        if 0 < smoothing < FINEST:
            raise ValueError(f"must be 0 or at least {FINEST}")
        return smoothing


class Moments:
    """Second moments of one layer along its eigenvectors.

    Args:
        pair: the layer and its factors.
        like: gives device and dtype.

    Attributes:
        sum_OI: the decayed sum.
        weight: the decayed count behind it, scalar tensor.
    """

    def __init__(self, pair: LayerPair, like: Tensor) -> None:
        assert pair.g is not None
        self._rows, self._columns = blocks_of(pair.g), blocks_of(pair.a)
        self.sum_OI = like.new_zeros(pair.g.dims.side, pair.a.dims.side)
        self.weight = like.new_zeros(())
        for block, view_DR in zip(self._rows, self._split(self.sum_OI, self._rows), strict=True):
            block.carried.append(view_DR)
        for block, view_DR in zip(self._columns, self._split(self.sum_OI.mT, self._columns), strict=True):
            block.carried.append(view_DR)

    @staticmethod
    def _split(x_DR: Tensor, blocks: Sequence[EigenBlock]) -> tuple[Tensor, ...]:
        return torch.split(x_DR, [block.values_D.numel() for block in blocks])

    def add(self, turned_OI: Tensor, terms: Tensor, decay: float, take: Tensor) -> None:
        """S <- decay S + terms M' o M' and n <- decay n + 1, where `take`."""
        new_OI = decay * self.sum_OI + terms * turned_OI.square()
        self.sum_OI.copy_(torch.where(take, new_OI, self.sum_OI))
        self.weight.copy_(torch.where(take, decay * self.weight + 1, self.weight))

    def mean(self) -> Tensor:
        """S / n, averaged over neighbouring eigenvectors, [O, I]."""
        s_IO = blockwise(self._rows, self.sum_OI, EigenBlock.averaged).mT
        s_OI = blockwise(self._columns, s_IO, EigenBlock.averaged).mT
        return s_OI / self.weight.clamp_min(kron.TINY)


def blocks_of(factor: Factor) -> list[EigenBlock]:
    """The blocks of a factor, which are all of this kind."""
    return [block for block in factor.blocks if isinstance(block, EigenBlock)]


def blockwise(
    blocks: Sequence[EigenBlock], x_DR: Tensor, act: Callable[[EigenBlock, Tensor], Tensor]
) -> Tensor:
    """What every block makes of its rows, put together again.

    Shapes:
        x_DR, result: [D, R], D the sum of the blocks' sides.
    """
    parts = torch.split(x_DR, [block.values_D.numel() for block in blocks])
    return torch.cat([act(block, part) for block, part in zip(blocks, parts, strict=True)])


class Method(KroneckerMethod):
    """EKFAC on the layers of a model; arguments as of `KroneckerMethod`."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        self._width, self._decay = config.smoothing, config.moment_decay
        super().__init__(config, model, device, rank, world_size, example)
        self.moments = {pair.layer.name: Moments(pair, self._like) for pair in self._pairs}
        self._terms: float | Tensor = 0.0
        self._counted_in = False
        self._total = self._like
        self._take = torch.ones((), dtype=torch.bool, device=device)

    def _factor(self, dims: FactorDims) -> Factor:
        return Factor(dims, self._like, [EigenBlock(side, self._like, self._width) for side in dims.blocks])

    # -- a window -----------------------------------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Decide what the window's passes measure, and count its loss terms from zero."""
        super().begin_window(step, retry)
        self._terms = 0.0

    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """Set the scale of the output gradients to come and count the loss terms behind them."""
        if self.capture.take_a:
            self._terms = self._terms + terms
        super().before_backward(scale, terms, last)

    def measured_badly(self) -> Tensor:
        """Of the statistics; the gradients are statistics as well, so all ranks have to agree on every step."""
        found = super().measured_badly()
        self._counted_in = found is not None
        return torch.zeros_like(self._take) if found is None else found

    def update(self, step: int, bad: Tensor | None) -> None:
        """Reduce the window's sums to their owners, average, and find the eigenvectors of what is due."""
        super().update(step, bad if self._counted_in else None)
        self._take = torch.ones_like(self._take) if bad is None else ~bad
        terms = self._terms if isinstance(self._terms, Tensor) else self._like.new_tensor(self._terms)
        self._total = collectives.all_sum(terms.to(self._like.dtype).reshape(1))[0]

    def _apply(self, pairs: Sequence[LayerPair], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Q_G [M' / (S + l)] Q_A^T."""
        a, matrices = blocks_of(pairs[0].a), [pair.matrix(gradients) for pair in pairs]
        half_OI = torch.cat(
            [
                blockwise(blocks_of(_g(pair)), m_OI, EigenBlock.turned)
                for pair, m_OI in zip(pairs, matrices, strict=True)
            ]
        )
        sizes = [m_OI.shape[0] for m_OI in matrices]
        scaled = []
        for pair, turned_OI in zip(
            pairs, torch.split(blockwise(a, half_OI.mT, EigenBlock.turned).mT, sizes), strict=True
        ):
            moments = self.moments[pair.layer.name]
            moments.add(turned_OI, self._total, self._decay, self._take & pair.ready())
            shift = a[0].shift * blocks_of(_g(pair))[0].shift
            scaled.append(turned_OI / (moments.mean() + shift))
        updates: dict[str, Tensor] = {}
        parts = torch.split(blockwise(a, torch.cat(scaled).mT, EigenBlock.back).mT, sizes)
        for pair, part_OI in zip(pairs, parts, strict=True):
            u_OI = blockwise(blocks_of(_g(pair)), part_OI, EigenBlock.back)
            updates |= pair.flattened(torch.where(pair.ready(), u_OI, torch.zeros_like(u_OI)))
        return updates

    # -- state --------------------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Tensor]:
        """Second moments of all layers that this rank applies, by name."""
        out: dict[str, Tensor] = {}
        for name, one in self.moments.items():
            out |= {f"{name}/moments/sum": one.sum_OI, f"{name}/moments/weight": one.weight}
        return out

    def state_bytes(self) -> int:
        """Bytes of factors, eigenvectors and second moments on this rank."""
        return super().state_bytes() + sum(t.numel() * t.element_size() for t in self._kept().values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of the factors and layers that this rank is the first owner of."""
        mine = {pair.layer.name for pair in self._pairs if self.owners[pair.layer.weight] == self.rank}
        own = {name: tensor for name, tensor in self._kept().items() if name.rsplit("/", 2)[0] in mine}
        return super().state_tensors() | own

    def wants(self, name: str) -> bool:
        """Whether this rank keeps the factor or the layer that a tensor belongs to."""
        return name in self._kept() or super().wants(name)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the factors and layers that this rank keeps; ages come with `load_counters`."""
        super().load_state_tensors(tensors)
        take_over(self._kept(), tensors, "was it written with another model?")


def _g(pair: LayerPair) -> Factor:
    """The factor of the output gradients, which EKFAC always has."""
    assert pair.g is not None
    return pair.g
