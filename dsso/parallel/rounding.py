"""Stochastic rounding to 16 bits: a number goes to one of its two neighbours, on average it stays what it is.

A step that is smaller than half a unit in the last place is lost when it is rounded to the nearest; rounded up with the
probability of what it stands for it is kept on average, without a copy of the weights in fp32 (Gupta et al. 2015, "Deep
learning with limited numerical precision", section 3). The bits come from Philox4x32-10, like the directions of
`noise.py`: they depend on (seed, name, unsharded flat index, stream) alone, so all ranks round alike, whatever the
sharding and the device.

Specification. Key and counter are those of `noise.py`, with the stream 2^23 + stream, which no direction has, and four
elements a block: element 4 b + k gets w_k, all of its 32 bits. With s = m 2^e the number in fp32 (m an integer below
2^24) and 2^u the distance of its neighbours in the type of 16 bits (below the smallest normal number that of the
subnormal ones), the magnitude becomes

    floor((floor(2^32 m 2^(e - u)) + w) / 2^32) 2^u

A number that the type has stays itself, with the sign of a zero. The probability of going up is that of what is cut
off; it is exact for bf16 and, for fp16, from 2^-33 on (below, it is cut off at 2^-32 of a unit). Beyond the largest
finite number the neighbours go on as if exponents did, and what reaches the next one is infinite. What is not finite
is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsso.parallel import noise, noise_cpu, noise_triton
from dsso.parallel.noise import MAX_STREAM, Direction

_CHUNK = 1 << 18
"""Elements that the plain form rounds at a time, a multiple of every block."""
_PER_BLOCK = 4
_FORMATS = {torch.bfloat16: (7, 1, 0x7F80), torch.float16: (10, 113, 0x7C00)}
"""Digits after the point, lowest exponent as fp32 writes it, and the bits of infinity."""


@torch.no_grad()
def round_stochastic(out: Tensor, value: Tensor, direction: Direction, start: int) -> None:
    """Set `out` to `value`, each element rounded to one of its neighbours.

    Args:
        out: contiguous, bf16 or fp16.
        value: contiguous, of as many elements, in fp32 or of the type of `out` (then it is copied).
        direction: names the random bits by its seed, name and stream; its kind plays no part. Two roundings of one
            weight need two streams (or seeds), else they err in the same direction.
        start: unsharded flat index of the first element.

    Raises:
        ValueError: tensors that do not fit, are not contiguous, or of other types.
    """
    _set(out, value, direction, None, start, 0.0)


@torch.no_grad()
def add_stochastic(out: Tensor, base: Tensor, direction: Direction, start: int, scale: float) -> None:
    """Set `out` to base + scale z, computed in fp32, each element rounded to one of its neighbours.

    The bits are those of `round_stochastic` with the same direction.

    Args:
        out: contiguous, bf16 or fp16; may be `base` itself.
        base: contiguous, of as many elements, in fp32 or of the type of `out`.
        direction: z.
        start: unsharded flat index of the first element.
        scale: of z; rounded to fp32.

    Raises:
        ValueError: tensors that do not fit, are not contiguous, or of other types.
    """
    _set(out, base, direction, direction.kind, start, scale)


def _set(
    out: Tensor, base: Tensor, direction: Direction, kind: noise.Kind | None, start: int, scale: float
) -> None:
    if out.numel() != base.numel() or not (out.is_contiguous() and base.is_contiguous()):
        raise ValueError("two contiguous tensors of one size are needed")
    if out.dtype not in _FORMATS or base.dtype not in (out.dtype, torch.float32):
        raise ValueError(f"{base.dtype} cannot be rounded to {out.dtype}; from fp32 to bf16 or fp16 it can")
    if not out.numel():
        return
    stream = MAX_STREAM + direction.stream
    fused = noise_triton if out.is_cuda else noise_cpu
    if noise.fused_allowed() and fused.add(out, base, direction.words, kind, start, scale, stream):
        return
    into, of = out.view(-1), base.view(-1)
    for at in range(0, out.numel(), _CHUNK):
        length = min(_CHUNK, out.numel() - at)
        value = of.narrow(0, at, length).to(torch.float32)
        if kind is not None:
            z = noise.sample(direction, start + at, length, out.device)
            value = value + z * torch.tensor(scale, dtype=torch.float32)
        words = noise.words_of(direction, stream, _PER_BLOCK, start + at, length, out.device)
        word = words.view(-1).narrow(0, (start + at) % _PER_BLOCK, length)
        into.narrow(0, at, length).copy_(_rounded(value, word, out.dtype))


def _rounded(value: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """The specification in integers.

    Args:
        value: fp32.
        words: below 2^32, int64, of its shape.
        dtype: bf16 or fp16.

    Shapes:
        result: that of `value`.
    """
    digits, lowest, infinity = _FORMATS[dtype]
    pattern = value.view(torch.int32).to(torch.int64)
    raised = (pattern >> 23) & 0xFF
    exponent = raised.clamp(min=1)
    top = exponent.clamp(min=lowest)
    significand = (pattern & 0x7FFFFF) | ((raised > 0).to(torch.int64) << 23)
    # At least 13 digits are dropped, so 32 more have room; up to 32 dropped digits nothing is lost.
    fixed = (significand << 32) >> (23 - digits + top - exponent).clamp(max=63)
    magnitude = (((top - lowest) << digits) + ((fixed + words) >> 32)).clamp(max=infinity)
    finite = (magnitude | ((pattern >> 16) & 0x8000)).to(torch.int16).view(dtype)
    return torch.where(raised == 0xFF, value.to(dtype), finite)
