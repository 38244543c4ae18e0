"""A plan as a table to be read."""

from __future__ import annotations

from collections.abc import Iterator

from dsso.plan.report import Plan

_NAMES = {"single": "one device", "ddp": "DDP", "fsdp2": "FSDP2"}


def text(plan: Plan) -> str:
    """The plan in some thirty lines; sizes in GB of 1e9 bytes (MB of 1e6 below one)."""
    return "\n".join(_lines(plan))


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _lines(plan: Plan) -> Iterator[str]:
    worst = plan.worst
    number = plan.ranks.index(worst)
    engine = _NAMES.get(plan.engine, f"DeepSpeed ZeRO {plan.engine[-1]}")
    yield (
        f"plan         {plan.optimizer}, {engine}, {plan.dtype}, {plan.world_size} rank(s):"
        f" {plan.parameters:,} parameters, {plan.trained:,} trained"
    )
    if plan.factors:
        shared = f"; {plan.shared} layers use the input factor of another" if plan.strategy else ""
        yield f"             {plan.factors} {plan.parts}{shared}"
    yield ""
    yield f"memory of rank {number}, the fullest"
    least = min(plan.ranks, key=lambda rank: rank.peak)
    passes = plan.operations.passes
    rows = [
        ("weights", worst.weights, ""),
        ("gradients", worst.gradients, "when the optimizer steps"),
        ("masters", worst.masters, "fp32 copies of trained weights"),
        ("moments", worst.moments, ""),
    ]
    if passes:
        rows = [
            rows[0],
            ("copies", worst.masters, "that are stepped"),
            ("state", worst.moments, "of the method"),
        ]
    if plan.factors:
        total = sum(rank.factors for rank in plan.ranks)
        if plan.strategy:
            rows += [
                ("factors", worst.factors, f"with factorizations; all ranks together {size(total)}"),
                ("statistics", worst.statistics, f"{_how(plan)}, {_when(plan)}"),
                ("  later", worst.statistics_later, f"{_how(plan)}, measurements spread over their interval"),
                ("refresh", worst.refresh, "at most, when all factors are factorized in one step"),
                ("  later", worst.refresh_later, "at most, spread over their interval"),
            ]
        else:
            rows += [
                ("blocks", worst.factors, f"state of the method; all ranks together {size(total)}"),
                ("refresh", worst.refresh, "at most, one block after another"),
            ]
        rows.append(
            ("exchange", worst.exchange, "at most, whole gradients and updates of what this rank owns")
        )
    if worst.vectors:
        rows.append(("vectors", worst.vectors, "of the method, while windows of estimation run"))
    if worst.answers:
        rows.append(("answers", worst.answers, "products with curvature, until the blocks are refreshed"))
    rows += [
        (
            "buckets",
            worst.buckets,
            f"at most, {'perturbed or gathered weights' if passes else 'the engine' + chr(39) + 's'} while passes run",
        ),
        ("in a pass", worst.in_pass, "everything, activations not counted"),
        ("in the step", worst.in_step, "everything"),
    ]
    for name, count, remark in rows:
        yield f"  {name:<12}{size(count):>13}  {remark}".rstrip()
    yield f"  {'peak':<12}{size(worst.peak):>13}  least of all ranks {size(least.peak)}"
    if worst.host:
        yield f"  {'on the host':<12}{size(worst.host):>13}  slices of the weights, their copies and state"
    yield "  Not counted: activations, temporary results inside operations, the allocator's gaps, the device's context."
    yield ""
    yield from _traffic(plan)
    yield ""
    yield from _work(plan)
    if plan.strategies or plan.gpu_bytes is not None:
        yield ""
        yield from _verdict(plan)
    yield from (f"note         {note}" for note in plan.notes)


def _how(plan: Plan) -> str:
    return "sent while the pass runs" if plan.sent_in_pass else "at most"


def _when(plan: Plan) -> str:
    if plan.all_until is None:
        return "whenever factors are measured: all in one step"
    last = plan.all_until - 1
    steps = "in step 0" if last == 0 else f"in steps 0 to {last}"
    return f"{steps} and after a lost one: all factors"


def _traffic(plan: Plan) -> Iterator[str]:
    wire = plan.wire
    yield "on the wire, by the size of messages"
    if plan.operations.passes:
        yield f"  {'losses':<12}{wire.losses:>10,} B  a step, whatever the model"
    else:
        yield f"  {'gradients':<12}{size(wire.gradients):>13}  a step, reduced by the engine"
    yield f"  {'weights':<12}{size(wire.weights):>13}  a step, gathered by the engine"
    if plan.factors:
        yield f"  {'exchange':<12}{size(wire.exchange):>13}  a step, sent by the busiest rank: gradients and updates"
        if plan.strategy:
            yield f"  {'statistics':<12}{size(wire.statistics):>13}  a measurement of all factors, to their owners"
            if wire.bases:
                yield f"  {'bases':<12}{size(wire.bases):>13}  a measurement of all factors, of low-rank forms"
            yield f"  {'factors':<12}{size(wire.factorizations):>13}  a refresh, factorizations to other appliers"
    if wire.estimates:
        yield f"  {'estimates':<12}{size(wire.estimates):>13}  a step on average, for curvature by windows of its own"
    yield f"  {'in all':<12}{size(wire.per_step):>13}  a step on average, by the schedule's last intervals"


def _work(plan: Plan) -> Iterator[str]:
    work = plan.operations
    yield "operations of a rank, products with weights at full length"
    told = f"{work.passes} forward passes" if work.passes else "forward and backward passes"
    yield f"  {'training':<12}{_flops(work.training):>15}  {told} of a step"
    if plan.factors:
        yield f"  {'precondition':<12}{_flops(work.apply):>15}  a step"
        if plan.strategy:
            yield f"  {'measure':<12}{_flops(work.measure):>15}  all factors once"
        yield f"  {'refresh':<12}{_flops(work.refresh):>15}  all {plan.parts} once, on the busiest rank"
    if work.estimates:
        yield f"  {'estimates':<12}{_flops(work.estimates):>15}  a step on average, windows of estimation"
    if plan.factors or work.estimates:
        yield f"  {'in all':<12}{100 * work.share:>13.2f} %  of training, by the schedule's last intervals"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.4f} TFLOP"


def _verdict(plan: Plan) -> Iterator[str]:
    limit = plan.gpu_bytes
    yield "who applies the factors" if plan.strategies else "memory"
    for row in plan.strategies:
        mark = "" if row.fits is None else ", fits" if row.fits else ", does not fit"
        chosen = " (the recipe's)" if row.name == plan.strategy else ""
        yield (
            f"  {row.name:<24}factors {size(row.factors):>10}, peak {size(row.peak):>10},"
            f" wire {size(row.wire_per_step):>10} a step{mark}{chosen}"
        )
    if limit is None:
        return
    if plan.fits:
        yield f"fits         {size(limit)}: {size(limit - plan.worst.peak)} are left for activations"
        return
    yield f"does not fit {size(limit)}: {size(plan.worst.peak - limit)} are missing, activations not counted"
    good = [remedy for remedy in plan.remedies if remedy.fits]
    tried = len(plan.remedies)
    if not good:
        least = min(plan.remedies, key=lambda remedy: remedy.peak, default=None)
        needs = "" if least is None else f"; the least needs {size(least.peak)} ({least.change})"
        yield f"             none of {tried} changes that were planned is enough{needs}"
        return
    found = good[0]
    sets = " ".join(f"--set {override}" for override in found.overrides)
    yield f"             of {tried} changes planned one after the other, the first that fits:"
    yield f"             {found.change}, peak {size(found.peak)}{': ' if sets else ''}{sets}"
