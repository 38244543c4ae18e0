"""Labels drawn from the model's own predictions, for the true Fisher instead of the empirical one.

The draw for a term depends on (seed, step, example, position) alone, so it does not matter which rank or micro-batch
holds the example. For squared errors (y - f)^2 the model is Gaussian with variance 1/2, so that its negative
log-likelihood is the loss itself up to a constant.

Source: Martens 2020, "New insights and perspectives on the natural gradient method", section 5.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["cross_entropy", "mse"]

_MASK = (1 << 63) - 1
# Odd constants of the SplitMix64 finalizer, as signed 64-bit numbers: integer tensors wrap around.
_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of signed 64-bit numbers."""
    return (x >> bits) & (_MASK >> (bits - 1))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit numbers that scatters their bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(seed: int, step: int, example_ids: Tensor, positions: Tensor) -> Tensor:
    """Numbers in (0, 1), one for each pair of example and position, in fp64.

    Shapes:
        example_ids, positions: int64, broadcast against each other; the result has their common shape.
    """
    key = _mix(example_ids * _GAMMA + seed)
    key = _mix(key + positions * _GAMMA + step)
    # 53 bits: every value is a double between 0 and 1, both excluded.
    return (_shift_right(key, 11).to(torch.float64) + 0.5) / float(1 << 53)


def sample_labels(
    logits_NC: Tensor, kind: LossKind, seed: int, step: int, example_ids_N: Tensor, positions_N: Tensor
) -> Tensor:
    """One label a row, drawn from the model's predictive distribution.

    Args:
        logits_NC: [N, C] logits, or [N] or [N, 1] predictions for `mse`.
        kind: of the loss.
        seed: of the run.
        step: of the run.
        example_ids_N: int64, index of each row's example in the data set.
        positions_N: int64, position of each row in its example (0 where there is one).

    Returns:
        [N] class indices, or values for `mse`.
    """
    u_N = uniforms(seed, step, example_ids_N, positions_N)
    if kind == "cross_entropy":
        cumulated_NC = torch.softmax(logits_NC.detach().to(torch.float64), dim=-1).cumsum(-1)
        picked_N = (cumulated_NC < u_N.unsqueeze(1) * cumulated_NC[:, -1:]).sum(-1)
        return picked_N.clamp_max(logits_NC.shape[-1] - 1)
    predictions_N = logits_NC.detach().reshape(-1).to(torch.float64)
    drawn_N: Tensor = predictions_N + 0.5**0.5 * torch.special.ndtri(u_N)
    return drawn_N.to(logits_NC.dtype)
