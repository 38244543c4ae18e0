"""K-FAC: Kronecker-factored approximate curvature for linear layers, factors owned by one rank each.

For a layer s = W [x; 1] with loss gradient g at s, its block of the Fisher is approximated by A (x) G with
A = E[[x; 1][x; 1]^T] and G = E[g g^T], and the update is

    U = (G + l_G I)^-1 M (A + l_A I)^-1,        M = dL/dW, a bias as one more column       (M & G 2015, eq. 12)

A and G are debiased moving averages: sums and counts decay alike, S <- beta S + sum, N <- beta N + count,
average S/N. Factors and their factorizations live on the owner that `dsso.parallel.placement` names; statistics are
reduced to it, gradients come to it and updates go back through `dsso.parallel.fragments`. Layers that read the same
tensor share one A. A wide side may be kept as leading eigenpairs and a mean tail, or be cut into blocks.

Sources: Martens and Grosse 2015 (blocks, pi-split damping); Eschenhagen et al. 2023 (expand, reduce); Benzing 2022
(forward-only: G = I); "Applying second order optimization to deep transformers with parameter-efficient tuning"
2023 (Newton-step clipping, intervals). Deviations from the last: factors are on the scale of one loss term instead
of the mean loss, averages are debiased, padding is masked out, damping is relative by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsso.linalg import solve_cpu
from dsso.optim._factor import Factor, solved_blocks
from dsso.optim._forms import in_form
from dsso.optim._gradient_config import BaseConfig
from dsso.optim._kfac_config import Config
from dsso.optim._kronecker import KroneckerMethod
from dsso.optim._layer import LayerPair, precondition
from dsso.parallel import collectives
from dsso.parallel.placement import FactorDims

__all__ = ["BaseConfig", "Config", "Method"]


class Method(KroneckerMethod):
    """K-FAC on the layers of a model; arguments as of `KroneckerMethod`."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        if device.type == "cpu":
            solve_cpu.allow(all(collectives.gather_objects(solve_cpu.works())))
        self._inverses = config.keeps_inverses(device.type != "cpu")
        self._energy, self._narrow = config.low_rank_energy, config.storage == "bfloat16"
        super().__init__(config, model, device, rank, world_size, example)

    def _factor(self, dims: FactorDims) -> Factor:
        storage = torch.bfloat16 if self._narrow else self._like.dtype
        return Factor(
            dims, self._like, solved_blocks(dims, self._like, storage, self._energy, self._inverses)
        )

    def _apply(self, pairs: Sequence[LayerPair], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return precondition(pairs, gradients)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the factors that this rank keeps; ages come with `load_counters`."""
        super().load_state_tensors(in_form(tensors, self._inverses))
