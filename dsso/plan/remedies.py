"""What to change where a plan does not fit, in the order in which it is tried."""

from __future__ import annotations

from collections.abc import Iterator

from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim.kfac import Config
from dsso.plan.report import Plan
from dsso.recipe import Recipe

Change = tuple[str, str]
"""In words, and as an override."""


def alternatives(recipe: Recipe, found: Plan) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Changes in words, as overrides, and the number of ranks; what leaves the step as it is comes first.

    Args:
        recipe: that does not fit.
        found: its plan.
    """
    world, same, cheaper = found.world_size, _same_step(recipe, found), _cheaper(recipe)
    for change, override in (*same, *cheaper):
        yield change, (override,), world
    for change, override in same[-1:]:
        for other, second in cheaper:
            yield f"{change} and {other}", (override, second), world
    for ranks in (2 * world, 4 * world, 8 * world):
        yield f"{ranks} ranks", (), ranks
        for change, override in same[-1:]:
            yield f"{ranks} ranks and {change}", (override,), ranks
            if cheaper and isinstance(recipe.optimizer_config, Config):
                low = "optimizer.params.low_rank=32"
                yield f"{ranks} ranks, {change} and low rank 32", (override, low), ranks


def _same_step(recipe: Recipe, found: Plan) -> list[Change]:
    """Changes after which every step is what it was, up to rounding."""
    changes = []
    config = recipe.optimizer_config
    if isinstance(config, KroneckerConfig):
        if config.strategy != "memory_optimal":
            changes.append(("memory-optimal placement", "optimizer.params.strategy=memory_optimal"))
        if config.accumulate == "rank" and config.overlap and not found.sent_in_pass:
            changes.append(("sums at their owners after each pass", "optimizer.params.accumulate=owner"))
    if found.engine == "ddp":
        changes.append(("FSDP2", "dsso.engine=fsdp2"))
    if found.engine.startswith("zero-"):
        stages = range(recipe.zero_stage + 1, 4)
        changes += [(f"ZeRO stage {stage}", f"zero_optimization.stage={stage}") for stage in stages]
    return changes


def _cheaper(recipe: Recipe) -> list[Change]:
    """Other forms of the factors, each of them smaller than the recipe's; of a copy in fp32; none for a baseline."""
    config = recipe.optimizer_config
    if getattr(config, "rounding", None) == "nearest" and recipe.precision.dtype != "float32":
        return [("stochastic rounding", "optimizer.params.rounding=stochastic")]
    if not isinstance(config, KroneckerConfig):
        return []
    changes = []
    if isinstance(config, Config) and config.storage != "bfloat16":
        changes.append(("factors in bfloat16", "optimizer.params.storage=bfloat16"))
    sides = [s for s in (4096, 2048, 1024, 512) if config.block_side is None or s < config.block_side]
    changes += [(f"blocks of {side}", f"optimizer.params.block_side={side}") for side in sides]
    if not isinstance(config, Config):
        return changes
    kept = [k for k in (64, 32) if config.low_rank is None or k < config.low_rank]
    changes += [(f"low rank {rank}", f"optimizer.params.low_rank={rank}") for rank in kept]
    return changes
