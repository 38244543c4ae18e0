"""Files of tensors with the permissions that any other new file gets."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; one that is there already is replaced.

    safetensors makes files that their owner alone can read. What the umask leaves is asked from a file that is made in
    the ordinary way: the umask itself can only be read by setting it, which other threads would notice.

    Args:
        tensors: contiguous tensors that share no memory.
        path: the file.
        about: kept in its header.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.torch.save_file(dict(tensors), path, None if about is None else dict(about))
    path.chmod(mode)
