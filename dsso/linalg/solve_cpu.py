"""The compiled form of `triangle.solve_lower` for CPUs, for a few columns: adapters' gradients have as many as a rank.

BLAS takes twice as long as reading the matrix twice does; a plain step of K-FAC on adapters is little else.

Legend of shape suffixes: `D` side of the matrix, `R` columns of a right-hand side.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dsso.linalg import compiled

SOURCE = Path(__file__).with_name("solve.cpp")
WIDTH = 8
"""Columns come in multiples of this; those that are missing are filled up with zeros."""
MOST_COLUMNS = 32
MOST_THREADS = 2
"""The kernel runs on one thread: where torch may use more than these, it is the faster one."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


_ALLOWED = [True]


def works() -> bool:
    """Whether the kernel can be built and used here."""
    return _kernel() is not None


def allow(everywhere: bool) -> None:
    """Use the kernel, or leave all solves to torch: ranks that work on one layer must not differ in rounding.

    Args:
        everywhere: all ranks can use it.
    """
    _ALLOWED[0] = everywhere


def solve(lower_DD: Tensor, v_DR: Tensor) -> Tensor | None:
    """(L L^T)^-1 V; None where there is no kernel for it.

    Args:
        lower_DD: square with L on and below its diagonal, row by row in memory; fp32 or bf16, computed in fp32.
        v_DR: fp32.

    Shapes:
        result: [D, R].
    """
    columns = v_DR.shape[1]
    known = lower_DD.dtype in _TYPES and v_DR.dtype == torch.float32 and 0 < columns <= MOST_COLUMNS
    if not known or lower_DD.device.type != "cpu" or not lower_DD.is_contiguous():
        return None
    if torch.get_num_threads() > MOST_THREADS or not _ALLOWED[0]:
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    side, padded = v_DR.shape[0], -(-columns // WIDTH) * WIDTH
    values_DR = v_DR.new_empty(side, padded)
    values_DR[:, :columns] = v_DR
    values_DR[:, columns:] = 0
    work_DR = torch.empty_like(values_DR)
    kind = _TYPES[lower_DD.dtype]
    if kernel(lower_DD.data_ptr(), kind, side, values_DR.data_ptr(), work_DR.data_ptr(), padded):
        return None
    return values_DR[:, :columns]


@lru_cache(maxsize=1)
def _kernel() -> ctypes._NamedFuncPointer | None:
    library = compiled.library(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernel = library.dsso_solve_lower
    kernel.argtypes = [pointer, number, ctypes.c_int64, pointer, pointer, number]
    kernel.restype = number
    return kernel
