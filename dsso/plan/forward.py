"""What a run of a method from forward passes needs: no gradients, no activations that wait for a backward pass."""

from __future__ import annotations

from typing import Any

from dsso.optim import resolve
from dsso.plan.layout import BYTES, rows
from dsso.plan.model import Survey
from dsso.plan.report import Operations, Plan, RankBytes, Wire
from dsso.recipe import ResolvedRecipe

_PREFETCH = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`, in elements."""
_LATER = 10**9
"""A step at which schedules have their last values."""


def forward_plan(seen: Survey, recipe: ResolvedRecipe, engine: str, gpu_bytes: int | None) -> Plan:
    """Plan a run.

    Args:
        seen: the model.
        recipe: resolved for the number of ranks.
        engine: `single`, `ddp`, `fsdp2`, or `zero-0` to `zero-3`.
        gpu_bytes: memory of a device; None asks for no verdict.
    """
    method: Any = resolve(recipe.optimizer_type).Method(recipe.optimizer_config)
    world = recipe.world_size
    probes = method.probes(_LATER)
    spread = bool(method.spread) and world > 1
    streams = {probe.stream for probe in probes if probe.scale}
    # In a spread step a rank has its share of the directions, and everybody the weights themselves.
    passes = len(probes)
    if spread:
        base = sum(not probe.scale for probe in probes)
        passes = base + (len(probes) - base) // len(streams) * -(-len(streams) // world)
    gas = recipe.gas * (world if spread else 1)
    gathered = BYTES[recipe.precision.dtype] * seen.total * passes * gas
    sharded = engine in ("fsdp2", "zero-3") and world > 1
    losses = len(probes) * 2 * 8 if world > 1 else 0
    weights = gathered if sharded else 0
    return Plan(
        engine=engine,
        world_size=world,
        dtype=recipe.precision.dtype,
        optimizer=recipe.optimizer_type,
        strategy="",
        parameters=seen.total,
        trained=sum(weight.numel for weight in seen.trained),
        factors=0,
        largest_unit=0,
        shared=0,
        ranks=tuple(_rank(seen, recipe, engine, rank, method) for rank in range(world)),
        sent_in_pass=False,
        all_until=None,
        wire=Wire(weights=weights, losses=losses, per_step=weights + losses),
        operations=Operations(training=passes * _forward(seen, recipe, gas), passes=passes),
        gpu_bytes=gpu_bytes,
        rows=tuple(
            {
                "parameter": w.name,
                "shape": w.shape,
                "method": recipe.optimizer_type,
                "owner": None,
                "reason": "",
            }
            for w in seen.trained
        ),
        notes=seen.notes,
    )


def _offloaded(recipe: ResolvedRecipe) -> bool:
    device: object = (
        recipe.ds_config.get("zero_optimization", {}).get("offload_param", {}).get("device", "none")
    )
    return device == "cpu"


def _rank(seen: Survey, recipe: ResolvedRecipe, engine: str, rank: int, method: Any) -> RankBytes:
    b, world = BYTES[recipe.precision.dtype], recipe.world_size
    by_unit: dict[int, int] = {}
    trained: dict[int, int] = {}
    for weight in seen.weights:
        by_unit[weight.unit] = by_unit.get(weight.unit, 0) + weight.numel
        trained[weight.unit] = trained.get(weight.unit, 0) + weight.numel * weight.trained
    root = by_unit.pop(-1, 0)
    on_host = engine == "zero-3" and _offloaded(recipe)
    wide = b == 4 or method.stochastic
    if engine == "fsdp2":
        shards = {weight.name: rows(weight, world, rank) for weight in seen.weights}
        weights = b * sum(padded for padded, _ in shards.values())
        held = sum(shards[weight.name][1] for weight in seen.trained)
        copies = not wide or method.shows_state
        buckets = b * (root + 2 * max(by_unit.values(), default=0))
    elif engine == "zero-3":
        pieces = {weight.name: -(-weight.numel // world) for weight in seen.weights}
        weights = b * sum(pieces.values())
        held = sum(max(0, min(pieces[w.name], w.numel - rank * pieces[w.name])) for w in seen.trained)
        copies = True
        largest = max(weight.numel for weight in seen.weights)
        zero = recipe.ds_config.get("zero_optimization", {}).get("stage3_prefetch_bucket_size", _PREFETCH)
        ahead = _PREFETCH if zero == "auto" else int(zero)
        buckets = b * min(seen.total, largest + ahead) if world > 1 or on_host else 0
    else:
        weights = b * seen.total
        held = sum(weight.numel for weight in seen.trained)
        copies = not wide
        # A block at a time; outside of blocks an embedding, of which a CPU copies what is looked up only.
        outside = max((w.numel for w in seen.trained if w.unit < 0), default=0)
        inside = max((count for unit, count in trained.items() if unit >= 0), default=0)
        buckets = 0 if copies else b * max(inside, outside)
    weights += seen.buffer_bytes
    masters = (b if method.stochastic else 4) * held if copies else 0
    state = 4 * held * len(method.states)
    # With offload_param slices, their copies and state are in the host's memory; what is gathered is not.
    host = masters + state + weights - seen.buffer_bytes if on_host else 0
    if on_host:
        weights, masters, state = seen.buffer_bytes, 0, 0
    lasting = weights + masters + state
    return RankBytes(
        weights=weights,
        masters=masters,
        moments=state,
        factors=0,
        gradients=0,
        gradients_in_pass=0,
        buckets=buckets,
        lasting=0,
        sums=0,
        statistics=0,
        statistics_later=0,
        refresh=0,
        refresh_later=0,
        exchange=0,
        in_pass=lasting + buckets,
        in_step=lasting,
        host=host,
    )


def _forward(seen: Survey, recipe: ResolvedRecipe, gas: int) -> float:
    """Operations of one forward pass over a rank's examples at full length."""
    tokens = seen.tokens(
        recipe.micro_batch * gas, recipe.dsso.task.max_length, recipe.dsso.task.max_target_length
    )
    return sum(2.0 * one.size * tokens[one.side] for one in seen.linears)
