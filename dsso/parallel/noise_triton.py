"""The fused form of `dsso.parallel.noise` for CUDA: written in Triton, compiled when it is first used.

Without Triton, where `DSSO_NO_COMPILER` is set or where Triton does not work, everything works all the same in torch's
own operations, more slowly and with the same stream.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
"""Philox4x32-10 of zeros (Random123's known answers)."""


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
    if not (out.is_cuda and base.device == out.device and known and works(out.device)):
        return False
    with torch.cuda.device(out.device):
        _kernels().launch(out, base, words, kind, start, scale, rounding)
    return True


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """The file with the kernels; None where it cannot be had. Triton may be absent, and takes its time to import."""
    if os.environ.get("DSSO_NO_COMPILER"):
        return None
    try:
        from dsso.parallel import philox_triton
    except ImportError:
        return None
    return philox_triton


@cache
def works(device: torch.device) -> bool:
    """Whether the kernels give the known answer on a device: Triton needs a C compiler and a driver that fits.

    Args:
        device: which; a CPU only for Triton's interpreter.
    """
    if _kernels() is None:
        return False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            z = torch.zeros(128, dtype=torch.bfloat16, device=device)
            _kernels().launch(z, z, (0, 0, 0, 0, 0), "rademacher", 0, 1.0, None)
            given = z.tolist() == known_signs()
            why = "it gives other numbers than the specification"
    except Exception as error:  # whatever Triton's compiler or its driver has raised, there is another way
        given, why = False, f"{type(error).__name__}: {error}"
    if not given:
        warnings.warn(
            f"random directions on {device} are made by torch's own operations, which is slower, because Triton does"
            f" not work there ({why.splitlines()[0]})",
            stacklevel=4,
        )
    return given


def known_signs() -> list[float]:
    """The first 128 elements of the Rademacher direction with seed, name and stream zero.

    Shapes:
        result: 128 numbers, 1 or -1.
    """
    return [-1.0 if word >> bit & 1 else 1.0 for word in _KNOWN for bit in range(32)]
