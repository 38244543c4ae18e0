"""Figures of one side of a block, as Shampoo, SOAP and PSGD keep it, from the tensors of a checkpoint.

The one place besides those methods that knows by which names their matrices are kept: `sum0`, `root0` (Shampoo),
`basis0` (SOAP) and `factor0` (PSGD) of the side 0, and so on.

Legend of shape suffixes: `D` side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dsso.curvature.quality import misfit
from dsso.linalg import kron
from dsso.optim._figures import RANK_CUT, FactorFigures
from dsso.optim._second_moment import lower

KINDS = {"root": "root of second moment", "basis": "basis of second moment", "factor": "triangular"}
"""What is kept of a side besides its second moment, if that is kept."""
_MATRIX = re.compile(rf"(.+)/({'|'.join(KINDS)})(\d+)")


def side_keys(names: Mapping[str, object]) -> dict[str, str]:
    """Sides among the names of a checkpoint's tensors, `BLOCK/NUMBER`, with the block of each, in their order."""
    found = [match for match in map(_MATRIX.fullmatch, names) if match]
    return {f"{match[1]}/{match[3]}": match[1] for match in found}


def names_of(key: str, names: Mapping[str, object]) -> list[str]:
    """Names of a side's tensors."""
    block, _, dim = key.rpartition("/")
    return [name for kind in ("sum", *KINDS) if (name := f"{block}/{kind}{dim}") in names]


def moment_of(key: str) -> str:
    """Name of a side's second moment, where it is kept."""
    block, _, dim = key.rpartition("/")
    return f"{block}/sum{dim}"


def figures(
    key: str,
    tensors: Mapping[str, Tensor],
    usable: bool,
    largest_side: int,
    measured: Mapping[str, Tensor] | None = None,
) -> FactorFigures:
    """Figures of one side.

    Args:
        key: of the side.
        tensors: at least its tensors, by their full names.
        usable: its block has a preconditioner.
        largest_side: eigenvalues of sides up to this one are computed.
        measured: the same side's tensors of another run or step, whose second moment stands for the curvature in the
            misfit; by default its own.

    Returns:
        Of Shampoo and SOAP mean and rank are those of the decayed second moment; the condition number is that of
        Shampoo's root, and for SOAP, whose bases are orthogonal, of the second moment. Of PSGD all three are those
        of Q^T Q. The misfit is that of Shampoo's root or of Q^T Q; SOAP has a second moment an element besides.
    """
    *moment, matrix = names_of(key, tensors)
    kind = next(kind for kind in KINDS if matrix.rpartition("/")[2].startswith(kind))
    matrix_DD = tensors[matrix].double()
    side = matrix_DD.shape[0]
    # Of a second moment the lower triangle alone is kept, which is what eigvalsh reads.
    kept_DD = lower(tensors[moment[0]].double(), side) if moment else matrix_DD.mT @ matrix_DD
    rank, condition, found = None, None, None
    if side <= largest_side:
        spectrum = torch.linalg.eigvalsh(kept_DD)
        rank = int((spectrum > RANK_CUT * spectrum.max().clamp_min(kron.TINY)).sum())
        acting = torch.linalg.eigvalsh(matrix_DD) if kind == "root" else spectrum
        if usable and acting.min() > 0:
            condition = float(acting.max() / acting.min())
        given = (tensors if measured is None else measured).get(moment_of(key))
        if usable and given is not None and kind != "basis":
            found = _misfit(matrix_DD if kind == "root" else matrix_DD.mT @ matrix_DD, given.double())
    mean = float(kept_DD.diagonal().mean())
    return FactorFigures(KINDS[kind], (side,), None, None, usable, mean, rank, condition, found)


def _misfit(p_DD: Tensor, kept: Tensor) -> float | None:
    """To the second moment of the gradient, which is what these methods whiten."""
    side = len(p_DD)
    if kept.numel() not in (side * side, side * (side + 1) // 2):
        return None
    lower_DD = lower(kept, side).tril()
    return misfit([p_DD], [lower_DD + lower_DD.tril(-1).mT])
