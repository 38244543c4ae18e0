"""Measure every k-th token only: which ones depends on the example and the step, not on how the batch was split.

A sequence contributes the tokens first + phase, first + phase + k, … where `first` is its first real token and the
phase is a hash of its own token ids and of the step. So the choice is the same whatever the micro-batch, the rank
and the padding; over steps and examples every token has the same chance, 1/k, also a first token that carries all of
the gradient. Shapes are fixed by those of the batch, nothing asks the device.

Legend of shape suffixes: `B` examples, `S` tokens, `J` chosen tokens, ceil(S/k), `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number: consecutive values are spread over all residues."""


def phases(ids: Tensor, mask: Tensor | None, step: int, stride: int) -> Tensor:
    """Phase of every example, in [0, stride).

    Shapes:
        ids: [B, S], integers. mask: [B, S] or None, 0 at padding. result: [B].
    """
    counted = (ids.to(torch.int64) + 1) * (1 if mask is None else (mask != 0))
    # A sum over the real tokens does not depend on where the padding is; squares tell apart what has equal sums.
    mixed = (counted + counted * counted * 31).sum(1) + step * 0x5851F42D
    mixed = mixed * _ODD
    mixed = mixed ^ (mixed >> 29)
    mixed = mixed * _ODD
    return ((mixed >> 33) & 0x3FFFFFFF) % stride


def choose(phase_B: Tensor, mask: Tensor | None, tokens: int, stride: int) -> tuple[Tensor, Tensor]:
    """Positions of the chosen tokens and whether each of them counts.

    Args:
        phase_B: from `phases`.
        mask: [B, S], 0 at padding; None: no padding.
        tokens: S.
        stride: k.

    Returns:
        Indices, [B, J], in range everywhere; and booleans, [B, J].
    """
    count = -(-tokens // stride)
    steps_J = torch.arange(count, device=phase_B.device) * stride
    first_B = torch.zeros_like(phase_B) if mask is None else (mask != 0).to(torch.int64).argmax(1)
    index_BJ = (first_B + phase_B).unsqueeze(1) + steps_J
    valid_BJ = index_BJ < tokens
    index_BJ = index_BJ.clamp(max=tokens - 1)
    if mask is not None:
        valid_BJ = valid_BJ & (mask.gather(1, index_BJ) != 0)
    return index_BJ, valid_BJ


def take(x_BSD: Tensor, index_BJ: Tensor) -> Tensor:
    """The chosen tokens.

    Shapes:
        result: [B, J, D].
    """
    examples, tokens, width = x_BSD.shape
    # Whole rows are copied; `gather` would look every number up.
    rows_BJ = index_BJ + torch.arange(examples, device=index_BJ.device).unsqueeze(1) * tokens
    return x_BSD.reshape(-1, width).index_select(0, rows_BJ.reshape(-1)).view(examples, -1, width)
