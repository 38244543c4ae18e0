"""Products of curvature with a vector, taken through scores: what a loss is a function of, one row a loss term.

With scores f(w), [N, C], and a loss L(f),

    G v = J^T (d2L/df2) J v        Gauss-Newton, also called the generalized Gauss-Newton matrix
    H v = d/dw <dL/dw, v>          Hessian

Nothing here reduces over ranks: an engine's own backward pass does, given a number whose gradient is the product. J v
comes from two reverse passes (exact; needs whole weights and operations that can be differentiated twice) or from
scores at two displaced weights, which is the business of the engine.

Sources: Schraudolph 2002, *Fast curvature matrix-vector products*, for the product through scores; Pearlmutter 1994
for H v; Martens 2020, section 8, for the matrix at sampled labels.

Legend of shape suffixes: `N` loss terms, `C` classes or values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsso.errors import RunError

Loss = Callable[[Tensor], Tensor]
"""Scalar loss of scores."""


def loss_curvature(loss: Loss, f_NC: Tensor, t_NC: Tensor) -> Tensor:
    """(d2L/df2) t by two reverse passes through the loss alone, [N, C].

    Args:
        loss: of scores.
        f_NC: the scores.
        t_NC: what is multiplied.
    """
    with torch.enable_grad():
        leaf_NC = f_NC.detach().requires_grad_(True)
        (slope_NC,) = torch.autograd.grad(loss(leaf_NC), leaf_NC, create_graph=True)
        if not slope_NC.requires_grad:
            return torch.zeros_like(t_NC)  # linear in the scores
        (out_NC,) = torch.autograd.grad(slope_NC, leaf_NC, t_NC.to(slope_NC.dtype))
    return out_NC


def sampled_curvature(sampled: Loss, terms: float | Tensor, f_NC: Tensor, t_NC: Tensor) -> Tensor:
    """One draw of (d2L/df2) t: s <s, t> by row, with s the slope of a term's loss at a label drawn from the model.

    Args:
        sampled: sum over terms of the losses at drawn labels, divided by `terms`.
        terms: the divisor.
        f_NC: the scores.
        t_NC: what is multiplied.
    """
    with torch.enable_grad():
        leaf_NC = f_NC.detach().requires_grad_(True)
        (s_NC,) = torch.autograd.grad(sampled(leaf_NC), leaf_NC)
    rows_NC = s_NC.flatten(1) if s_NC.dim() > 1 else s_NC.unsqueeze(1)
    along_N1 = (rows_NC * t_NC.to(s_NC.dtype).reshape(rows_NC.shape)).sum(1, keepdim=True)
    return (rows_NC * along_N1 * terms).reshape(s_NC.shape)


def pushforward(f_NC: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Tensor:
    """J v by two reverse passes, [N, C]; the graph of the scores stays.

    Args:
        f_NC: scores with their graph.
        parameters: that the scores may depend on.
        vector: of their shapes.

    Raises:
        RunError: an operation of the model cannot be differentiated twice.
    """
    u_NC = torch.zeros_like(f_NC, requires_grad=True)
    pulled = _twice(lambda: torch.autograd.grad(f_NC, parameters, u_NC, create_graph=True, allow_unused=True))
    pairs = [(g, v.to(g.dtype)) for g, v in zip(pulled, vector, strict=True) if g is not None]
    used = [(g, v) for g, v in pairs if g.requires_grad]
    if not used:
        return torch.zeros_like(f_NC)
    outputs, directions = zip(*used, strict=True)
    _refuse_dead_ends(outputs)
    (out_NC,) = _twice(lambda: torch.autograd.grad(outputs, u_NC, directions))
    found: Tensor = out_NC.detach()
    return found


def hessian_product(
    loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """H v; None for a parameter that it is zero of.

    Args:
        loss: scalar with its graph.
        parameters: that it may depend on.
        vector: of their shapes.

    Raises:
        RunError: an operation of the model cannot be differentiated twice.
    """
    slopes = _twice(lambda: torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    pairs = [(g, v.to(g.dtype)) for g, v in zip(slopes, vector, strict=True) if g is not None]
    used = [(g, v) for g, v in pairs if g.requires_grad]
    if not used:
        return (None,) * len(parameters)
    outputs, directions = zip(*used, strict=True)
    _refuse_dead_ends(outputs)
    found: tuple[Tensor | None, ...] = _twice(
        lambda: torch.autograd.grad(outputs, parameters, directions, allow_unused=True)
    )
    return found


def with_gradient(parameters: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> Tensor:
    """A scalar whose gradient is what is wanted: <w, wanted>, so that an engine's backward pass reduces it.

    Args:
        parameters: w. Every one takes part, so that an engine that counts gradients finds them all.
        wanted: of their shapes; None: zero.
    """
    parts = [
        (w * (torch.zeros_like(w) if g is None else g.detach())).sum(
            dtype=torch.promote_types(w.dtype, torch.float32)
        )
        for w, g in zip(parameters, wanted, strict=True)
    ]
    return torch.stack(parts).sum()


def _refuse_dead_ends(slopes: Sequence[Tensor]) -> None:
    """Find operations that were declared not to be differentiable twice: autograd passes them over without a word."""
    seen: set[Any] = set()
    waiting: list[Any] = [slope.grad_fn for slope in slopes]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("::Error"):
            raise _refusal("an operation of it says so")
        waiting.extend(following for following, _ in node.next_functions)


def _refusal(why: str) -> RunError:
    return RunError(
        f"the model cannot be differentiated twice ({why})",
        where="optimizer.params.products",
        remedy="set products to 'difference', or the model's attention to 'eager' and its activation "
        "checkpointing off",
    )


def _twice(action: Callable[[], Any]) -> Any:
    """Name the way out where autograd has none."""
    try:
        return action()
    except RuntimeError as error:
        raise _refusal(str(error).splitlines()[0]) from error
