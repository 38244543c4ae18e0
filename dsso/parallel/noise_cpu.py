"""The compiled form of `dsso.parallel.noise` for CPUs; see `dsso.linalg.compiled` for when there is none."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dsso.linalg import compiled

SOURCE = Path(__file__).with_name("philox.cpp")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {None: 0, "rademacher": 1, "gaussian": 2}


def add(
    out: Tensor,
    base: Tensor,
    words: tuple[int, int, int, int, int],
    kind: str | None,
    start: int,
    scale: float,
    rounding: int | None = None,
) -> bool:
    """Set `out` to base + scale z, where there is a kernel for it.

    Args:
        out: contiguous.
        base: contiguous, of its size.
        words: of the direction.
        kind: of z; None: out = base, rounded.
        start: unsharded flat index of the first element.
        scale: of z.
        rounding: stream of the bits of stochastic rounding (`rounding.py`); None: to the nearest.

    Returns:
        Whether it was done.
    """
    known = out.dtype in _TYPES and base.dtype in (out.dtype, torch.float32)
    if out.device.type != "cpu" or base.device.type != "cpu" or not known:
        return False
    library = _library()
    if library is None:
        return False
    key = (ctypes.c_uint32 * 6)(*words, rounding or 0)
    threads = torch.get_num_threads()
    status: int = library.dsso_add_noise(
        out.data_ptr(),
        base.data_ptr(),
        _TYPES[out.dtype],
        _TYPES[base.dtype],
        out.numel(),
        start,
        key,
        _KINDS[kind],
        int(rounding is not None),
        scale,
        threads,
    )
    return status == 0


def works() -> bool:
    """Whether the kernel can be built and used here."""
    return _library() is not None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = compiled.library(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.dsso_add_noise.argtypes = [pointer, pointer, number, number, ctypes.c_int64, ctypes.c_uint64]
    library.dsso_add_noise.argtypes += [pointer, number, number, ctypes.c_float, number]
    library.dsso_add_noise.restype = ctypes.c_int
    return library
