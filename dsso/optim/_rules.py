"""Base methods: SGD with momentum and AdamW on flat pieces of parameters, dropped as a whole by a device flag.

Weight decay is decoupled from the update (Loshchilov and Hutter 2019). A dropped step leaves the parameters, the
moments and the step counts bitwise as they were, without asking the device whether it was dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from dsso.linalg import triangle

RuleName = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Rule:
    """How an update reaches a group of parameters.

    Attributes:
        name: `sgd` or `adamw`.
        lr_ratio: learning rate over that of the recipe's schedule.
        weight_decay: decoupled (the parameters shrink by lr * weight_decay a step) unless `coupled`.
        momentum: of `sgd`: m <- momentum m + u, without dampening.
        nesterov: of `sgd`: step along u + momentum m.
        coupled: weight decay is added to the update instead, as in the first SGD and Adam.
        betas, eps: of `adamw`.
        kept: names of what an elementwise method keeps of every element besides.
    """

    name: RuleName
    lr_ratio: float = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    coupled: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kept: tuple[str, ...] = ()

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of what is kept of every element."""
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq", *self.kept)
        return ("exp_avg", *self.kept) if self.momentum else self.kept


def apply_sgd(
    rule: Rule, parameters: list[Tensor], updates: list[Tensor], momenta: list[Tensor], lr: float, bad: Tensor
) -> None:
    """P <- (1 - lr wd) p - lr m with m <- momentum m + u, in place; nothing where `bad`.

    Args:
        rule: its constants.
        parameters: pieces of them.
        updates: of the same shapes; overwritten.
        momenta: of the same shapes.
        lr: learning rate of the step.
        bad: boolean scalar tensor.
    """
    keep = (~bad).to(parameters[0].dtype)
    kept = [keep] * len(parameters)
    if not triangle.asking_is_free(bad):
        for u in updates:
            # NaN times zero is NaN: a dropped update has to be replaced, not multiplied.
            u.masked_fill_(bad, 0.0)
    elif bad:
        return
    if rule.coupled and rule.weight_decay:
        torch._foreach_addcmul_(updates, parameters, kept, value=rule.weight_decay)
    if rule.momentum:
        torch._foreach_mul_(momenta, torch.where(bad, 1.0, rule.momentum).to(keep.dtype))
        torch._foreach_add_(momenta, updates)
        if rule.nesterov:
            torch._foreach_add_(updates, momenta, alpha=rule.momentum)
        else:
            updates = momenta
    if rule.weight_decay and not rule.coupled:
        torch._foreach_mul_(parameters, 1.0 - keep * (lr * rule.weight_decay))
    torch._foreach_addcmul_(parameters, updates, kept, value=-lr)


def apply_adamw(
    rule: Rule,
    parameters: list[Tensor],
    updates: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    steps: list[Tensor],
    lr: float,
    bad: Tensor,
) -> None:
    """AdamW, or Adam where decay is coupled, by torch's fused kernels, in place; nothing where `bad`.

    Args:
        rule: its constants.
        parameters: pieces of them.
        updates: of the same shapes.
        moments: first and second moments of the pieces.
        steps: number of steps taken, one scalar tensor a piece.
        lr: learning rate of the step.
        bad: boolean scalar tensor.
    """
    kernel = adam if rule.coupled else adamw
    kernel(
        parameters,
        updates,
        moments[0],
        moments[1],
        [],
        steps,
        fused=True,
        grad_scale=None,
        found_inf=bad.to(torch.float32).reshape(()),
        amsgrad=False,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        lr=lr,
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        maximize=False,
    )
