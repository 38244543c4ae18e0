"""out[i] = base[i] + scale z[start + i], z from Philox4x32-10: the fused kernel of `dsso.parallel.noise` for CUDA.

The specification is in `noise.py`, that of stochastic rounding in `rounding.py`; this kernel gives the same stream
(Rademacher bit by bit, Gaussian up to the rounding of log, sin and cos, for which the polynomials of `philox.cpp` are
taken). Only `noise_triton.py` imports this file, because Triton may be absent.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_KINDS = {None: 0, "rademacher": 1, "gaussian": 2}
_WARPS = 4
_SIZES = {"signs": 4096, "fours": 2048}
"""Elements a program: where a counter gives 128, many, so that the words cost nothing; else few, for the registers."""
_ALIGNED = 128
"""Programs start at multiples of the largest block, so that no counter is cut."""
_WORDS = ["first", "scale", "seed_0", "seed_1", "name_0", "name_1", "stream", "rounding"]


def _kernel(function: Callable[..., Any]) -> Any:
    """Triton's compiler, which has no types; a word that happens to be 1 or a multiple of 16 makes no other kernel."""
    code = function.__code__
    return triton.jit(
        function, do_not_specialize=[w for w in _WORDS if w in code.co_varnames[: code.co_argcount]]
    )


@_kernel
def _philox(
    blocks: tl.tensor,
    seed_0: tl.tensor,
    seed_1: tl.tensor,
    name_0: tl.tensor,
    name_1: tl.tensor,
    stream: tl.tensor,
) -> tl.tensor:
    """Four words of each block of elements."""
    c0 = blocks.to(tl.uint32)
    c1 = tl.zeros_like(c0) + name_0.to(tl.uint32, bitcast=True)
    c2 = tl.zeros_like(c0) + name_1.to(tl.uint32, bitcast=True)
    c3 = (blocks >> 32).to(tl.uint32) | (stream.to(tl.uint32, bitcast=True) << 8)
    k0, k1 = seed_0.to(tl.uint32, bitcast=True), seed_1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@_kernel
def _side_by_side(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Four tensors [n] as one [4 n]: first the first elements of all."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * a.shape[0],))


@_kernel
def _pair(radius: tl.tensor, angle: tl.tensor) -> tl.tensor:
    """Box and Muller: two normal numbers from two words."""
    u = (radius >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    # Logarithm: minimax polynomial on [sqrt(1/2), sqrt(2)).
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2 * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    e, square = exponent.to(tl.float32), m * m
    log = m + (m * square * p - 0.5 * square - 2.12194440e-4 * e) + 0.693359375 * e
    r = tl.sqrt(-2.0 * log)
    # The nearest quarter of a turn is taken off exactly, as an integer.
    turn = (angle >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    x = (turn - (quarter << 22)).to(tl.float32) * 3.7450703e-07
    y = x * x
    s = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 - y * 1.9515295891e-4))
    c = (
        1.0
        - 0.5 * y
        + y * y * (4.166664568298827e-2 + y * (-1.388731625493765e-3 + y * 2.443315711809948e-5))
    )
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return r * cosine, r * sine


@_kernel
def _rounded(value: tl.tensor, word: tl.tensor, to: tl.constexpr) -> tl.tensor:
    """Stochastic rounding: of `rounding.py`, the same integers."""
    digits: tl.constexpr = 7 if to == tl.bfloat16 else 10
    lowest: tl.constexpr = 1 if to == tl.bfloat16 else 113
    infinity: tl.constexpr = 0x7F80 if to == tl.bfloat16 else 0x7C00
    bits = value.to(tl.int32, bitcast=True)
    raised = (bits >> 23) & 0xFF
    exponent = tl.maximum(raised, 1)
    top = tl.maximum(exponent, lowest)
    significand = (bits & 0x7FFFFF) | tl.where(raised > 0, 1 << 23, 0)
    dropped = tl.minimum(23 - digits + top - exponent, 63)
    fixed = (significand.to(tl.uint64) << 32) >> dropped.to(tl.uint64)
    units = ((fixed + word.to(tl.uint64)) >> 32).to(tl.int32)
    magnitude = tl.minimum(((top - lowest) << digits) + units, infinity)
    finite = (magnitude | ((bits >> 16) & 0x8000)).to(tl.uint16).to(to, bitcast=True)
    return tl.where(raised == 0xFF, value.to(to), finite)


@_kernel
def _add(
    out: tl.tensor,
    base: tl.tensor,
    count: tl.int64,
    shift: tl.int64,
    first: tl.int64,
    scale: tl.tensor,
    seed_0: tl.tensor,
    seed_1: tl.tensor,
    name_0: tl.tensor,
    name_1: tl.tensor,
    stream: tl.tensor,
    rounding: tl.tensor,
    kind: tl.constexpr,
    stochastic: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """`size` elements a program; the first program starts `shift` elements before the tensor, at 128 `first`.

    `scale` is given by its bits: as a number it would be of 64 bits to the interpreter.
    """
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, size)
    # 64 bits: a tensor may have more than 2^31 elements, and the interpreter keeps to no type but the number's.
    block = first.to(tl.int64)
    at = program * size + lane - shift
    inside = (at >= 0) & (at < count)
    value = tl.load(base + at, inside, other=0.0).to(tl.float32)
    fours = block * 32 + program * (size // 4) + tl.arange(0, size // 4)
    if kind == 1:
        blocks = block + program * (size // 128) + tl.arange(0, size // 128)
        w0, w1, w2, w3 = _philox(blocks, seed_0, seed_1, name_0, name_1, stream)
        words = _side_by_side(w0, w1, w2, w3)
        word = tl.reshape(tl.broadcast_to(words[:, None], (size // 32, 32)), (size,))
        sign = (word << (31 - lane % 32).to(tl.uint32)) & 0x80000000
        value += (sign ^ scale.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    if kind == 2:
        w0, w1, w2, w3 = _philox(fours, seed_0, seed_1, name_0, name_1, stream)
        z0, z1 = _pair(w0, w1)
        z2, z3 = _pair(w2, w3)
        value += scale.to(tl.float32, bitcast=True) * _side_by_side(z0, z1, z2, z3)
    if stochastic:
        w0, w1, w2, w3 = _philox(fours, seed_0, seed_1, name_0, name_1, rounding)
        result = _rounded(value, _side_by_side(w0, w1, w2, w3), out.dtype.element_ty)
    else:
        result = value.to(out.dtype.element_ty)
    tl.store(out + at, result, inside)


def launch(
    out: Tensor,
    base: Tensor,
    words: tuple[int, int, int, int, int],
    kind: str | None,
    start: int,
    scale: float,
    rounding: int | None,
) -> None:
    """Start the kernel on the current device and stream.

    Args:
        out: contiguous, in fp32, bf16 or fp16.
        base: contiguous, of its size and device, of its type or in fp32.
        words: of the direction.
        kind: of z; None: out = base, rounded.
        start: unsharded flat index of the first element.
        scale: of z.
        rounding: stream of the bits of stochastic rounding; None: to the nearest.
    """
    size = _SIZES["signs" if kind == "rademacher" and rounding is None else "fours"]
    first, shift = divmod(start, _ALIGNED)
    # As signed numbers: Triton would make other kernels for words from 2^31 on.
    keys = [word - (word >> 31 << 32) for word in (*words, rounding or 0)]
    _add[(triton.cdiv(shift + out.numel(), size),)](
        out,
        base,
        out.numel(),
        shift,
        first,
        ctypes.c_int32.from_buffer(ctypes.c_float(scale)).value,
        *keys,
        kind=_KINDS[kind],
        stochastic=rounding is not None,
        size=size,
        num_warps=_WARPS,
    )
