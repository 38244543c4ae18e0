"""The two forms of a dense factorization, Cholesky factor and inverse, turned into each other when a run goes on.

A checkpoint holds the form that its run applied; another device, or another `apply`, may want the other one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsso.errors import RunError
from dsso.optim._factor import CHOLESKY, INVERSE


def in_form(tensors: Mapping[str, Tensor], inverse: bool) -> dict[str, Tensor]:
    """The tensors of factors, dense factorizations in the form that is wanted.

    Args:
        tensors: by name, as `Factor.state` and `Refresh.state_tensors` give them.
        inverse: the form wanted.

    Raises:
        RunError: where a factorization is of no positive definite matrix.
    """
    old, new = (CHOLESKY, INVERSE) if inverse else (INVERSE, CHOLESKY)
    turned = {name.removesuffix(old) for name in tensors if name.endswith(f"/{old}")}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(f"/{old}"):
            out[name.removesuffix(old) + new] = _turned(tensor, inverse, name)
        elif _pending_block(name) in turned and not tensors[f"{name.removesuffix('/0')}/1"]:
            out[name] = _turned(tensor, inverse, name)
        else:
            out[name] = tensor
    return out


def _pending_block(name: str) -> str | None:
    """Of the matrix of a factorization under way: what names of its block start with; None for other tensors."""
    parts = name.split("/")
    if len(parts) < 4 or parts[-4] != "pending" or parts[-1] != "0":
        return None
    return "/".join([*parts[:-4], parts[-2], ""])


def _turned(square_DD: Tensor, inverse: bool, name: str) -> Tensor:
    """Another lower triangle below the diagonal, in float64; what is above stays."""
    lower_DD = square_DD.tril().double()
    if inverse:
        made_DD, bad = torch.cholesky_inverse(lower_DD), torch.zeros(())
    else:
        chol_DD, bad = torch.linalg.cholesky_ex(lower_DD)
        if not bad:
            made_DD, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(chol_DD))
    if bad or not torch.isfinite(made_DD.diagonal()).all():
        raise RunError(
            "a factorization of the checkpoint cannot be turned into the form that this run applies",
            where=name,
            allowed="that of a positive definite matrix",
            remedy=f'go on with "apply": "{"solve" if inverse else "inverse"}"',
        )
    return square_DD.triu(1) + made_DD.tril().to(square_DD.dtype)
