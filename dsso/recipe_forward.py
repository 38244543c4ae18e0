"""What a recipe may ask of a method that needs only losses: there are no gradients, and nothing to scale or clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsso.config import removal
from dsso.ds_keys import FIXED_FOR_METHODS
from dsso.errors import RecipeError
from dsso.recipe_checks import lookup
from dsso.schedule import ScheduleSpec, values

_NO_GRADIENTS = {
    "gradient_clipping": "; optimizer.params.max_slope bounds the slopes",
    "data_types.grad_accum_dtype": "",
    "zero_optimization.offload_optimizer.device": "; stage 3 shards the master weights over the ranks",
}
"""Settings about gradients and the optimizer of DeepSpeed, and what to do instead."""


def check_for_ranks(config: Any, world_size: int) -> None:
    """Refuse numbers of directions that ranks cannot share evenly, where every rank has its own.

    Args:
        config: parameters of the method.
        world_size: number of ranks.

    Raises:
        RecipeError: at some step there would be another number.
    """
    if not getattr(config, "spread", False) or world_size == 1:
        return
    given = config.directions
    ramp = isinstance(given, ScheduleSpec) and given.type != "piecewise" and given.start != given.end
    wrong = [count for count in values(given) if int(count) % world_size]
    if ramp or wrong:
        raise RecipeError(
            f"{'a ramp of' if ramp else int(wrong[0])} direction(s) cannot be spread evenly over {world_size} ranks",
            where="optimizer.params.directions",
            got=given.to_json() if isinstance(given, ScheduleSpec) else given,
            allowed=f"a multiple of {world_size}, or a piecewise schedule of such",
            remedy="change it, or set optimizer.params.spread to false",
        )


def check_for_forward(raw: Mapping[str, Any], method: str, stage: int) -> tuple[str, ...]:
    """Refuse what such a method has no use for, or cannot work with.

    Args:
        raw: the recipe.
        method: `optimizer.type`.
        stage: ZeRO stage.

    Returns:
        Notes for the user.

    Raises:
        RecipeError: for a setting that would be ignored in silence, or that would change the losses.
    """
    for path, instead in _NO_GRADIENTS.items():
        value = lookup(raw, path)
        if value not in (None, 0, "auto", "none"):
            raise RecipeError(
                f"{method} takes steps from losses alone: there are no gradients",
                where=path,
                got=value,
                remedy=removal(path.removesuffix(".device"), instead),
            )
    device = lookup(raw, "zero_optimization.offload_param.device", "none")
    if device != "none" and (device != "cpu" or stage != 3):
        raise RecipeError(
            f"weights can be kept on the host at ZeRO stage 3, not on {device!r} at stage {stage}",
            where="zero_optimization.offload_param.device",
            got=device,
            allowed="'cpu' at stage 3",
            remedy=removal("zero_optimization.offload_param", ", or set zero_optimization.stage to 3"),
        )
    for path, (works, _) in FIXED_FOR_METHODS.items():
        value = lookup(raw, path, works)
        if value not in (works, "auto"):
            sliced = path.startswith("zero_optimization.")
            why = (
                "a rank writes its own slices of the weights as they are"
                if sliced
                else "losses are evaluated in the model's own precision, by the module as it is, without gradients"
            )
            raise RecipeError(
                f"does not work with {method}: {why}",
                where=path,
                got=value,
                allowed=str(works).lower(),
                remedy=removal(path),
            )
    if stage in (1, 2):
        return (
            f"ZeRO stage {stage} shards gradients and their optimizer's state, which {method} does not have: every rank"
            " holds all weights. Stage 3 shards them",
        )
    return ()
