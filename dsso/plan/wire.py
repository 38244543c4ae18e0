"""Bytes on the wire: what the engine sends in a window, what a method adds, what estimates of curvature take."""

from __future__ import annotations

from collections.abc import Sequence

from dsso.optim._estimation import Estimation
from dsso.plan.blocks import MatrixPlan
from dsso.plan.exchange import Exchange
from dsso.plan.factors import KroneckerPlan
from dsso.plan.layout import Layout, Traffic
from dsso.plan.model import Survey
from dsso.plan.report import Wire


def of_estimates(
    estimation: Estimation,
    sent: Traffic,
    seen: Survey,
    shares: Sequence[Layout],
    exchanges: Sequence[Exchange],
) -> int:
    """Bytes that estimates of curvature put on the wire, a step on average.

    Args:
        estimation: what the method asks for.
        sent: by the engine in a window.
        seen: the model.
        shares: of every rank.
        exchanges: of every rank, where parameters have owners.
    """
    probed = {weight.name: weight.numel for weight in seen.trained if weight.name not in seen.rest}
    # Who has a parameter whole asks nobody for it.
    pieces = (
        sum(held for name, held in share.held.items() if held < probed.get(name, 0)) for share in shares
    )
    return int(
        estimation.windows * (sent.gradients + sent.weights)
        + estimation.forwards * sent.forward
        + 2 * estimation.displacements * sent.moved
        + estimation.directions * 4 * (len(shares) - 1) * max(pieces)
        + estimation.gathers * max((e.gathered for e in exchanges), default=0)
    )


def on_the_wire(
    sent: Traffic, method: KroneckerPlan | MatrixPlan | None, exchanges: Sequence[Exchange], estimates: int
) -> Wire:
    """All of it.

    Args:
        sent: by the engine in a window.
        method: plan of a method with owners.
        exchanges: of every rank, where parameters have owners.
        estimates: see `of_estimates`.
    """
    engine = sent.gradients + sent.weights
    if method is None:
        return Wire(sent.gradients, sent.weights, estimates=estimates, per_step=engine + estimates)
    measured, made = method.often
    exchange = max((e.sent for e in exchanges), default=0)
    statistics, bases, made_of = method.statistics_wire, method.bases_wire, method.factorizations_wire
    total = engine + estimates + exchange + measured * (statistics + bases) + made * made_of
    return Wire(
        gradients=sent.gradients,
        weights=sent.weights,
        exchange=exchange,
        statistics=statistics,
        bases=bases,
        factorizations=made_of,
        estimates=estimates,
        per_step=int(total),
    )
