"""Kernels of our own for CPUs: one C++ file each, built once a machine, with a plain C interface.

Without a compiler, or where `DSSO_NO_COMPILER` is set, everything works all the same in torch's own operations, more
slowly.
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

_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17"]


@lru_cache(maxsize=8)
def library(source: Path) -> ctypes.CDLL | None:
    """The kernels of a file, built where they are not there yet; None where they cannot be.

    Args:
        source: a C++ file that needs no headers but the standard ones.
    """
    if os.environ.get("DSSO_NO_COMPILER"):
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return None
    built = _place(source, compiler)
    if not built.is_file() and not _build(source, compiler, built):
        return None
    try:
        return ctypes.CDLL(str(built))
    except OSError:
        return None


def _place(source: Path, compiler: str) -> Path:
    """File of the library: another one for another source, compiler or processor (a home may be shared by machines)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsso"
    about = " ".join(
        [source.read_text(encoding="utf-8"), compiler, *_FLAGS, platform.machine(), _processor()]
    )
    return cache / f"{source.stem}_{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("flags", "model name", "Features")))


def _build(source: Path, compiler: str, built: Path) -> bool:
    """Compile into the cache, whole or not at all: other ranks may do the same at the same time."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.rename(built)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
