"""Where an engine keeps weights, gradients and optimizer state on one rank, and what it sends in a step.

Symbols in the comments: N trained elements, P a rank's partition of them, b bytes of a weight in the passes.
The figures are those of the engines as they are built by `dsso.engines`, and are tested against counted tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsso.plan.model import Survey, Weight
from dsso.recipe import ResolvedRecipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a weight, by the name of its type."""
_BUCKET = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`, in elements."""
_PERSISTENT = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in elements."""
_LIVE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`, in elements."""


@dataclass(frozen=True)
class Layout:
    """One rank.

    Attributes:
        weights: bytes of weights and buffers of the model.
        masters: bytes of fp32 copies that the optimizer steps; 0 where it steps the weights themselves.
        partition: elements of the optimizer's buffers, padding included: each moment has as many.
        held: elements of each trained parameter in them.
        passes: most bytes of gradients when the backward pass of a micro-batch ends.
        gradients: bytes of gradients when the optimizer steps.
        buckets: bytes that are there only while a pass runs: reduction buckets, weights gathered for use, and the
            pass's own gradients beside the sum of those before.
        lasting: those of them that stay during the step.
        averaging: bytes of copies of gradients between the passes and the step.
    """

    weights: int
    masters: int
    partition: int
    held: Mapping[str, int]
    passes: int
    gradients: int
    buckets: int = 0
    lasting: int = 0
    averaging: int = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank hands to the engine's collectives in a step: the size of the messages, whatever the algorithm.

    Attributes:
        gradients: reduced.
        weights: gathered.
        forward: gathered by the forward passes of a window alone.
        moved: gathered after weights have been written, so that the model computes with them.
    """

    gradients: int
    weights: int
    forward: int = 0
    moved: int = 0


def layout(survey: Survey, recipe: ResolvedRecipe, engine: str, rank: int) -> Layout:
    """Bytes of one rank.

    Args:
        survey: the model.
        recipe: resolved for the number of ranks.
        engine: `single`, `ddp`, `fsdp2`, or `zero-0` to `zero-3`.
        rank: which.
    """
    if engine in ("single", "ddp", "zero-0"):
        return _replica(survey, recipe, engine)
    if engine == "fsdp2":
        return _fsdp2(survey, recipe, rank)
    return _zero_3(survey, recipe, rank) if engine == "zero-3" else _zero_12(survey, recipe, engine, rank)


def _numel(weights: list[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def _replica(survey: Survey, recipe: ResolvedRecipe, engine: str) -> Layout:
    b, n = BYTES[recipe.precision.dtype], _numel(survey.trained)
    half = b < 4
    buckets = 0
    if not half:
        passes = step = 4 * n
    elif engine == "zero-0":
        # The weights' own gradients are accumulated, and stay beside the copies that are stepped.
        passes, step = b * n, (b + 4) * n
    else:
        # The window's sum in fp32; what a pass leaves at the weights goes into it at once.
        passes = step = 4 * n
        buckets = b * n if recipe.gas > 1 else 0
    several = recipe.world_size > 1
    return Layout(
        weights=b * survey.total + survey.buffer_bytes,
        masters=4 * n if half else 0,
        partition=n,
        held={weight.name: weight.numel for weight in survey.trained},
        passes=passes,
        gradients=step,
        buckets=buckets,
        averaging=0 if not several else 4 * n if engine == "ddp" else b * min(n, _BUCKET),
    )


def _zero(recipe: ResolvedRecipe, key: str, default: Any) -> Any:
    found = recipe.ds_config.get("zero_optimization", {}).get(key, default)
    return default if found in ("auto", None) else found


def _accumulation(recipe: ResolvedRecipe) -> int:
    return BYTES[recipe.precision.accumulation]


def keeps_all_in_fp32(recipe: ResolvedRecipe, engine: str) -> bool:
    """Whether DeepSpeed takes its optimizer for bf16 with fp32 accumulation, which sums whole gradients."""
    numbers = recipe.precision
    return engine == "zero-1" and numbers.dtype == "bfloat16" and numbers.accumulation == "float32"


def _zero_12(survey: Survey, recipe: ResolvedRecipe, engine: str, rank: int) -> Layout:
    b, a, world = BYTES[recipe.precision.dtype], _accumulation(recipe), recipe.world_size
    n = _numel(survey.trained)
    aligned = -(-n // (2 * world)) * 2 * world
    share = aligned // world
    held: dict[str, int] = {}
    whole = at = 0
    for weight in survey.trained:
        first, last = max(at, rank * share), min(at + weight.numel, (rank + 1) * share)
        if last > first:
            held[weight.name] = last - first
            whole += weight.numel
        at += weight.numel
    frozen = b * (survey.total - n) + survey.buffer_bytes
    copies = 2 if _zero(recipe, "overlap_comm", False) else 1
    bucket = copies * int(_zero(recipe, "reduce_bucket_size", _BUCKET))
    if keeps_all_in_fp32(recipe, engine):
        return Layout(
            weights=frozen + b * aligned,
            masters=4 * share,
            partition=share,
            held=held,
            passes=4 * aligned + b * n,
            gradients=4 * aligned + b * n,
        )
    contiguous = bool(_zero(recipe, "contiguous_gradients", True))
    if engine == "zero-1":
        # Whole gradients are summed up to the window's last pass, which reduces them.
        passes = a * n if recipe.gas > 1 else a * whole
        bucket *= a
    elif a != b:
        passes = 4 * share
        bucket *= b
    else:
        passes = b * whole
        bucket = b * (bucket + (whole if recipe.gas > 1 else 0))
    return Layout(
        weights=frozen + b * aligned,
        masters=4 * share,
        partition=share,
        held=held,
        passes=passes,
        gradients=4 * share,
        buckets=bucket if contiguous else 0,
    )


def _zero_3(survey: Survey, recipe: ResolvedRecipe, rank: int) -> Layout:
    b, a, world = BYTES[recipe.precision.dtype], _accumulation(recipe), recipe.world_size
    threshold = int(_zero(recipe, "stage3_param_persistence_threshold", _PERSISTENT))
    pieces = {weight.name: -(-weight.numel // world) for weight in survey.weights}
    # One rank's pieces are whole already.
    persistent = [weight.numel for weight in survey.weights if weight.numel <= threshold and world > 1]
    share = sum(pieces[weight.name] for weight in survey.trained)
    held = {w.name: max(0, min(pieces[w.name], w.numel - rank * pieces[w.name])) for w in survey.trained}
    live = min(int(_zero(recipe, "stage3_max_live_parameters", _LIVE)), survey.total - sum(persistent))
    contiguous = bool(_zero(recipe, "contiguous_gradients", True))
    lasting = b * int(_zero(recipe, "reduce_bucket_size", _BUCKET)) if contiguous else 0
    return Layout(
        weights=b * (sum(pieces.values()) + sum(persistent)) + survey.buffer_bytes,
        masters=4 * share,
        partition=share,
        held={name: numel for name, numel in held.items() if numel},
        passes=a * share,
        gradients=(a + 4) * share,
        buckets=b * live + lasting,
        lasting=lasting,
    )


def rows(weight: Weight, world: int, rank: int) -> tuple[int, int]:
    """Elements that FSDP2 gives to a rank: padded to the even share of rows, and its own."""
    count = weight.shape[0]
    each = -(-count // world)
    own = max(0, min(each, count - rank * each))
    width = weight.numel // count if count else 0
    return each * width, own * width


def holds_gradients(survey: Survey, world: int) -> bool:
    """Whether FSDP2 keeps whole gradients between micro-batches: they take no more room than a share of weights."""
    return _numel(survey.trained) * world <= survey.total


def _fsdp2(survey: Survey, recipe: ResolvedRecipe, rank: int) -> Layout:
    b, world = BYTES[recipe.precision.dtype], recipe.world_size
    shards = {weight.name: rows(weight, world, rank) for weight in survey.weights}
    held = {w.name: shards[w.name][1] for w in survey.trained if shards[w.name][1]}
    padded = sum(shards[weight.name][0] for weight in survey.trained)
    frozen = sum(shards[weight.name][0] for weight in survey.weights if not weight.trained)
    by_unit: dict[int, int] = {}
    trained: dict[int, int] = {}
    for weight in survey.weights:
        by_unit[weight.unit] = by_unit.get(weight.unit, 0) + weight.numel
        trained[weight.unit] = trained.get(weight.unit, 0) + weight.numel * weight.trained
    root = by_unit.pop(-1, 0)
    largest = max(by_unit.values(), default=0)
    n = _numel(survey.trained)
    whole = 4 * n if holds_gradients(survey, world) and recipe.gas > 1 else 0
    return Layout(
        weights=4 * padded + b * frozen + survey.buffer_bytes,
        masters=0,
        partition=sum(held.values()),
        held=held,
        passes=max(4 * padded, whole),
        gradients=4 * padded,
        # The root's stay for the backward pass; the next block is gathered while one computes, and the gradients of
        # one are packed to be reduced.
        buckets=b * (root + 2 * largest) + (b + 4) * max(trained.values(), default=0),
    )


def traffic(survey: Survey, recipe: ResolvedRecipe, engine: str) -> Traffic:
    """What the engine sends in a step; at stage 3 and under FSDP2 at most that: weights may still be there.

    Args:
        survey: the model.
        recipe: resolved for the number of ranks.
        engine: as for `layout`.
    """
    world, gas = recipe.world_size, recipe.gas
    n, b = _numel(survey.trained), BYTES[recipe.precision.dtype]
    if world == 1:
        return Traffic(0, 0)
    sent = BYTES.get(_SHORT.get(str(recipe.ds_config.get("communication_data_type")), ""), b)
    if engine == "ddp":
        return Traffic(4 * n, 0)
    if engine == "fsdp2":
        root = sum(w.numel for w in survey.weights if w.unit < 0)
        reduced = 4 * n * (1 if holds_gradients(survey, world) else gas)
        return Traffic(reduced, b * gas * (2 * survey.total - root), b * gas * survey.total)
    if engine == "zero-0":
        return Traffic(sent * n, 0)
    if engine == "zero-3":
        threshold = int(_zero(recipe, "stage3_param_persistence_threshold", _PERSISTENT))
        small = [w for w in survey.weights if w.numel <= threshold]
        stepped = sum(w.numel for w in small if w.trained)
        forward = gas * (survey.total - sum(w.numel for w in small))
        return Traffic(sent * n * gas, b * (2 * forward + stepped), b * forward, b * stepped)
    reduced = 4 * n if keeps_all_in_fp32(recipe, engine) else sent * n * (gas if engine == "zero-2" else 1)
    return Traffic(reduced, b * n, moved=b * n)


_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "bfp16": "bfloat16"}
