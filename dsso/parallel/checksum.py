"""A number that two sets of weights share only if they are the same bit by bit, however they are spread over ranks.

Every element adds its bits, multiplied by an odd number made from its place, to a sum modulo 2^64. Sums of pieces add
up to that of the whole, so each rank sums what it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18
_MIX = -7046029254386353131
"""An odd number: 2^64 over the golden ratio, as a signed one."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@torch.no_grad()
def checksum(tensor: Tensor, start: int = 0) -> int:
    """Sum of some elements of a parameter.

    Args:
        tensor: contiguous, of any type.
        start: flat index of the first element.

    Shapes:
        tensor: any.

    Returns:
        A number from 0 to 2^64 - 1. Sums of pieces are to be added modulo 2^64.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    # The highest bit of 64 would vanish from the sum of an even number of elements: halves have places of their own.
    start *= bits.numel() // max(1, tensor.numel())
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for at in range(0, bits.numel(), _CHUNK):
        part = bits[at : at + _CHUNK].to(torch.int64)
        place = torch.arange(start + at, start + at + part.numel(), device=bits.device)
        # Integers wrap around, so the order of the sum makes no difference. Without the one, zeros would not count.
        total += ((part + 1) * (place * _MIX | 1)).sum()
    return int(total) % 2**64
