"""Figures of one Kronecker factor from the tensors of a checkpoint, without a model.

The one place besides `dsso.optim._factor` that knows by which names a factor's tensors are kept.

Legend of shape suffixes: `D` side, `K` rank of a low-rank form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsso.curvature.quality import misfit
from dsso.linalg import kron, lowrank, triangle
from dsso.optim._factor import CHOLESKY, INVERSE

RANK_CUT = 1e-6
"""Eigenvalues below this multiple of the largest do not count for the numerical rank."""


@dataclass(frozen=True)
class FactorFigures:
    """What there is to know about one factor, or one side of a block (`dsso.optim._block_figures`)."""

    kind: str
    """`dense`, `low rank`, `eigenvectors` or, where blocks differ, several; of a block's side what is kept of it."""
    sides: tuple[int, ...]
    """Of the blocks on the diagonal."""
    kept: int | None
    """Eigenpairs kept by low-rank blocks; None where all are dense."""
    used: int | None
    """Those of them that the factorization tells apart from the tail (`low_rank_energy` leaves out some)."""
    ready: bool
    """There is a usable factorization."""
    mean: float
    """Mean eigenvalue of the average."""
    rank: int | None
    """Numerical rank of the average at 1e-6; None where eigenvalues were not asked for."""
    condition: float | None
    """Largest over smallest eigenvalue of the damped factor as it is factorized."""
    misfit: float | None = None
    """What the side contributes to c(P) / c*, see `dsso.curvature.quality`; None where that is not known."""


def factor_keys(names: Mapping[str, object]) -> list[str]:
    """Keys of the factors among the names of a checkpoint's tensors, in their order."""
    return [name.removesuffix("/ready") for name in names if name.endswith("/ready")]


def figures(
    key: str, tensors: Mapping[str, Tensor], largest_side: int, measured: Mapping[str, Tensor] | None = None
) -> FactorFigures:
    """Figures of one factor.

    Args:
        key: of the factor.
        tensors: its tensors, by their full names.
        largest_side: eigenvalues of blocks up to this side are computed.
        measured: the same factor's tensors of another run or step, whose average stands for the curvature in the
            misfit; by default its own.
    """
    blocks = _blocks(key, tensors)
    own = {name.removeprefix(f"{key}/"): tensor for name, tensor in tensors.items()}
    weight = max(float(own["weight"]), kron.TINY)
    sides, kinds = [], []
    trace = 0.0
    for block in blocks:
        dense = "diagonal" in block
        sides.append(block["diagonal" if dense else "basis"].shape[0])
        kinds.append("eigenvectors" if "vectors" in block else "dense" if dense else "low rank")
        trace += float(block["diagonal"].sum() if dense else block["trace"])
    ready = bool(own["ready"])
    rank, condition, found = None, None, None
    if max(sides) <= largest_side:
        rank = _rank(blocks)
        condition = _condition(blocks) if ready else None
        found = _misfit(blocks, blocks if measured is None else _blocks(key, measured)) if ready else None
    kept = [block["basis"].shape[1] for block in blocks if "basis" in block]
    return FactorFigures(
        " and ".join(sorted(set(kinds))),
        tuple(sides),
        max(kept) if kept else None,
        max(_used(block) for block in blocks if "basis" in block) if kept and ready else None,
        ready,
        trace / (weight * sum(sides)),
        rank,
        condition,
        found,
    )


def _blocks(key: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors of the blocks on the diagonal by their short names, in float64."""
    own = {name.removeprefix(f"{key}/"): tensor for name, tensor in tensors.items()}
    blocks: list[dict[str, Tensor]] = []
    while any(name.startswith(f"{len(blocks)}/") for name in own):
        prefix = f"{len(blocks)}/"
        blocks.append({n.removeprefix(prefix): t.double() for n, t in own.items() if n.startswith(prefix)})
    return blocks


def _misfit(blocks: list[dict[str, Tensor]], measured: list[dict[str, Tensor]]) -> float | None:
    """Of the inverse to the curvature C itself, which answers a displacement v with C v: its moment is C^2."""
    if any("values" in block for block in blocks):
        return None  # EKFAC has a second moment an element, and no Kronecker structure but in its bases
    moments = [_average(block) for block in measured]
    if [len(c_DD) for c_DD in moments] != [len(_average(block)) for block in blocks]:
        return None
    return misfit([_inverse(block) for block in blocks], [c_DD @ c_DD for c_DD in moments])


def _average(block: dict[str, Tensor]) -> Tensor:
    """The running sum of one block."""
    if "diagonal" in block:
        square_DD = next(block[name] for name in (CHOLESKY, INVERSE, "sum") if name in block)
        return triangle.symmetric(square_DD, block["diagonal"], torch.float64)
    basis_DK = block["basis"]
    rest = lowrank.tail(lowrank.LowRank(basis_DK, block["core"], block["trace"]))
    return _leading(basis_DK, block["core"] - rest * _eye(len(block["core"]))) + rest * _eye(len(basis_DK))


def _inverse(block: dict[str, Tensor]) -> Tensor:
    """What one block is solved with, as a matrix."""
    if INVERSE in block:
        lower_DD = block[INVERSE].tril()
        return lower_DD + lower_DD.tril(-1).mT
    if CHOLESKY in block:
        return torch.cholesky_inverse(block[CHOLESKY].tril())
    return _leading(block["applied"], block["inverse"]) + block["tail"] * _eye(len(block["applied"]))


def _leading(basis_DK: Tensor, core_KK: Tensor) -> Tensor:
    return basis_DK @ core_KK @ basis_DK.mT


def _eye(side: int) -> Tensor:
    return torch.eye(side, dtype=torch.float64)


def _used(block: dict[str, Tensor]) -> int:
    # In Q K Q^T + s I a direction of the tail has nothing in K but rounding.
    return int((block["inverse"].diagonal().abs() > 1e-5 * block["tail"].abs()).sum())


def _rank(blocks: list[dict[str, Tensor]]) -> int:
    values = []
    for block in blocks:
        if "diagonal" in block:
            values.append(torch.linalg.eigvalsh(_average(block)))
        else:
            side, kept = block["basis"].shape
            form = lowrank.LowRank(block["basis"], block["core"], block["trace"])
            values += [torch.linalg.eigvalsh(block["core"]), lowrank.tail(form).expand(side - kept)]
    spectrum = torch.cat(values)
    return int((spectrum > RANK_CUT * spectrum.max().clamp_min(kron.TINY)).sum())


def _condition(blocks: list[dict[str, Tensor]]) -> float:
    values = []
    for block in blocks:
        if "values" in block:
            values.append(block["values"] + block["shift"])
        elif INVERSE in block:
            values.append(1 / torch.linalg.eigvalsh(block[INVERSE]))  # which reads the lower triangle
        elif CHOLESKY in block:
            # L L^T in float64 loses nothing of what the float32 in L holds, and takes a third of L's singular values
            lower_DD = block[CHOLESKY].tril()
            values.append(torch.linalg.eigvalsh(lower_DD @ lower_DD.mT))
        else:
            # the inverse is Q K Q^T + s I
            side, kept = block["basis"].shape
            tail = block["tail"].reshape(1)
            inverse = torch.cat([torch.linalg.eigvalsh(block["inverse"]) + tail, tail[: side - kept]])
            values.append(1 / inverse)
    spectrum = torch.cat(values)
    return float(spectrum.max() / spectrum.min())
