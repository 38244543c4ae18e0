"""Where products with curvature can be made as a recipe asks for them; see `dsso.engines.estimates`."""

from __future__ import annotations

from dsso.errors import RecipeError
from dsso.optim._gradient_config import GradientConfig
from dsso.recipe_checks import Precision


def check_products(config: object, method: str, numbers: Precision, stage: int, engine: str) -> None:
    """Refuse what would come out wrong, or not at all.

    Args:
        config: parameters of the method.
        method: its type.
        numbers: the number formats.
        stage: of ZeRO; 0 without DeepSpeed.
        engine: of the recipe.

    Raises:
        RecipeError: fp16; differences in bf16; double backward passes over sharded weights.
    """
    if getattr(config, "adaptive_damping", None) is not None and numbers.dtype != "float32":
        raise RecipeError(
            "what a step does to the loss is lost in the rounding of 16-bit weights",
            where="optimizer.params.adaptive_damping",
            got=numbers.dtype,
            allowed="float32",
            remedy="leave adaptive_damping out, or use fp32",
        )
    how = config.products_of_curvature if isinstance(config, GradientConfig) else None
    if how is None:
        return
    if numbers.dtype == "float16":
        raise RecipeError(
            f"{method} takes several windows a step, and a loss scale may change in each of them",
            where="fp16.enabled",
            got="fp16",
            allowed="fp32, or bf16 with products = double_backward",
            remedy="use bf16 or fp32",
        )
    if how == "difference" and numbers.dtype != "float32":
        raise RecipeError(
            f"{method} would take differences that are lost in the rounding of {numbers.dtype}",
            where="optimizer.params.products",
            got="difference",
            allowed="difference with fp32, double_backward with fp32 or bf16",
            remedy="set it to 'double_backward' (ZeRO stage 2 at most, or DDP), or use fp32",
        )
    if how == "double_backward" and (stage == 3 or engine == "fsdp2"):
        where = "FSDP2" if engine == "fsdp2" else "ZeRO stage 3"
        raise RecipeError(
            f"{where} has no whole weights to differentiate twice",
            where="optimizer.params.products",
            got="double_backward",
            allowed="difference; double_backward at ZeRO stages 0 to 2, under DDP and on one device",
            remedy="set it to 'difference' and use fp32, or use ZeRO stage 2",
        )
