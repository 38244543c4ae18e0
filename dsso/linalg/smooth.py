"""Averages over neighbours on a line, for numbers that belong to eigenvectors.

Eigenvectors of eigenvalues that lie close together are made of rounding: any rotation of them is as good. A figure of
each of them means something only as an average over the cluster, which no rotation changes. With positions x and a
width h the average here is

    s'_i = sum_k e^(-|x_i - x_k| / h) s_k / sum_k e^(-|x_i - x_k| / h)

It goes over smoothly from one cluster to two, and takes two running sums instead of a D x D matrix.

Legend of shape suffixes: `D` entries, `R` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 500.0
"""Longest line, in widths: e^500 is still a number in float64."""


def _weighted(s_RD: Tensor, up_D: Tensor) -> Tensor:
    """sum_k e^(-|x_i - x_k|) s_k, with e^x given."""
    before_RD = (s_RD * up_D).cumsum(-1) / up_D
    after_RD = (s_RD / up_D).flip(-1).cumsum(-1).flip(-1) * up_D
    return before_RD + after_RD - s_RD


def neighbours_mean(s_RD: Tensor, x_D: Tensor, width: float) -> Tensor:
    """Every number of a row as the average over its neighbours.

    Args:
        s_RD: rows of numbers that are not negative.
        x_D: their positions, ascending.
        width: h; positions further apart than 500 h from the first one count as that far. 0: nothing is averaged.

    Returns:
        Of the shape and dtype of `s_RD`; computed in float64.
    """
    if not width:
        return s_RD
    x_D = ((x_D - x_D[0]).double() / width).clamp_max(WIDEST)
    up_D = x_D.exp()
    s64_RD = s_RD.double()
    return (_weighted(s64_RD, up_D) / _weighted(torch.ones_like(up_D), up_D)).to(s_RD.dtype)
