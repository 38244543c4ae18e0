"""The compiled form of `dsso.parallel.noise` for CPUs: built once a machine, with a plain C interface.

Without a compiler, or where `DSSO_NO_COMPILER` is set, everything works all the same in torch's own operations, more
slowly and with the same stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("philox.cpp")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17"]
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


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The kernels, built where they are not there yet; None where they cannot be."""
    if os.environ.get("DSSO_NO_COMPILER"):
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return None
    built = _place(compiler)
    if not built.is_file() and not _build(compiler, built):
        return None
    try:
        library = ctypes.CDLL(str(built))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.dsso_add_noise.argtypes = [pointer, pointer, number, number, ctypes.c_int64, ctypes.c_uint64]
    library.dsso_add_noise.argtypes += [pointer, number, number, ctypes.c_float, number]
    library.dsso_add_noise.restype = ctypes.c_int
    return library


def _place(compiler: str) -> Path:
    """File of the library: another one for another source, compiler or processor (a home may be shared by machines)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsso"
    about = " ".join(
        [SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, platform.machine(), _processor()]
    )
    return cache / f"philox_{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("flags", "model name", "Features")))


def _build(compiler: str, built: Path) -> bool:
    """Compile into the cache, whole or not at all: other ranks may do the same at the same time."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.rename(built)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
