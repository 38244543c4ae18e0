"""Small runs for counting, as recipes by name."""

from __future__ import annotations

from typing import Any

import torch

from dsso import tasks
from dsso.plan import Plan, plan
from dsso.recipe import Recipe, load_recipe

BUCKET = 20_000
LOW: dict[str, Any] = {"low_rank": 8, "low_rank_above": 16}
BLOCKS: dict[str, Any] = {"block_side": 40}
FP32: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
LORA: dict[str, Any] = {"type": "lora", "r": 8}
ADAPTER: dict[str, Any] = {"type": "adapter", "bottleneck": 8}


def recipe(
    engine: str,
    dtype: str = "fp32",
    model: str = "tiny-llama",
    peft: dict[str, Any] | None = None,
    gas: int = 1,
    params: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """A recipe whose second step measures nothing.

    Args:
        engine: `single`, `ddp`, `fsdp2`, or `zero-0` to `zero-3`.
        dtype: `fp32` or `bf16`.
        model, peft: of the `"dsso"` section.
        gas: accumulation steps.
        params: of K-FAC, besides the intervals.
        sections: of the recipe.
    """
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {
            "type": "KFAC",
            "params": {"factor_interval": 2, "inverse_interval": 2, "stagger": False, **(params or {})},
        },
        "dsso": {
            "engine": "deepspeed" if engine.startswith("zero-") else engine,
            "model": {"name": model, "init": "random"},
            "peft": peft or {"type": "none"},
            "task": {"name": "builtin", "max_length": 96, "train_examples": 64, "eval_examples": 16},
            "train": {"max_steps": 10},
        },
        **sections,
    }
    if engine.startswith("zero-") and "zero_optimization" not in sections:
        out["zero_optimization"] = {
            "stage": int(engine[-1]),
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 100,
        }
    if dtype == "bf16":
        out["bf16"] = {"enabled": True}
    return out


def adamw(recipe_: dict[str, Any]) -> dict[str, Any]:
    """The baseline in the place of K-FAC."""
    return {**recipe_, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def other(method: str, recipe_: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Another method on gradients in the place of K-FAC."""
    return {**recipe_, "optimizer": {"type": method, "params": {"lr": 1e-3, **params}}}


def forward(method: str, recipe_: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A method from forward passes in the place of K-FAC."""
    return {**recipe_, "optimizer": {"type": method, "params": {"lr": 1e-4, **params}}}


FORWARD: dict[str, dict[str, Any]] = {
    "ddp fp32 mezo": forward("MeZO", recipe("ddp", gas=2), directions=2),
    "ddp fp32 mezo spread": forward("MeZO", recipe("ddp"), directions=4, spread=True, sides=1),
    "ddp bf16 mezo": forward("MeZO", recipe("ddp", "bf16")),
    "ddp bf16 rounded": forward("MeZO", recipe("ddp", "bf16", "tiny-t5"), rounding="stochastic"),
    "zero-2 fp32 adam": forward("ZO_Adam", recipe("zero-2")),
    "fsdp2 fp32 mezo": forward("MeZO", recipe("fsdp2", model="tiny-t5"), sides=1, directions=3),
    "fsdp2 fp32 hizoo": forward("HiZOO", recipe("fsdp2", model="tiny-roberta")),
    "fsdp2 bf16 adamm": forward("ZO_AdaMM", recipe("fsdp2", "bf16")),
    "fsdp2 bf16 lora rounded": forward(
        "MeZO", recipe("fsdp2", "bf16", "tiny-t5", LORA), rounding="stochastic"
    ),
    "zero-3 fp32 adamu": forward("ZO_AdaMU", recipe("zero-3"), t3=9),
    "zero-3 bf16 mezo": forward("MeZO", recipe("zero-3", "bf16", "tiny-opt")),
    "zero-3 bf16 rounded": forward("MeZO", recipe("zero-3", "bf16", "tiny-roberta"), rounding="stochastic"),
}


TWO_RANKS: dict[str, dict[str, Any]] = {
    "zero-0 fp32 dense": recipe("zero-0"),
    "zero-0 bf16 low rank": recipe("zero-0", "bf16", params=LOW),
    "zero-1 fp32 lora accumulated": recipe("zero-1", model="tiny-t5", peft=LORA, gas=2),
    "zero-1 bf16 summed in fp32, narrow factors": recipe(
        "zero-1", "bf16", params={"storage": "bfloat16"}, **FP32
    ),
    "zero-2 fp32 blocks": recipe("zero-2", params=BLOCKS),
    "zero-2 bf16 shampoo": other("SHAMPOO", recipe("zero-2", "bf16"), block_side=48),
    "zero-3 fp32 shampoo": other("SHAMPOO", recipe("zero-3", model="tiny-roberta"), grafting="none", beta1=0),
    "fsdp2 fp32 lora shampoo": other("SHAMPOO", recipe("fsdp2", model="tiny-t5", peft=LORA), momentum=0.5),
    "zero-2 bf16 soap": other("SOAP", recipe("zero-2", "bf16"), block_side=48),
    "zero-2 fp32 lora ekfac": other(
        "EKFAC", recipe("zero-2", model="tiny-t5", peft=LORA), **recipe("ddp")["optimizer"]["params"]
    ),
    "zero-2 bf16 sophia": other("SOPHIA", recipe("zero-2", "bf16"), estimate_interval=2),
    "zero-2 fp32 gauss-newton": other("GAUSS_NEWTON", recipe("zero-2"), iterations=2),
    "fsdp2 fp32 lora gauss-newton": other(
        "GAUSS_NEWTON", recipe("fsdp2", model="tiny-t5", peft=LORA), iterations=2
    ),
    "ddp fp32 adapter gauss-newton, blocks": other(
        "GAUSS_NEWTON",
        recipe("ddp", model="tiny-roberta", peft=ADAPTER),
        iterations=2,
        block_parameters=1200,
    ),
    "fsdp2 fp32 sophia, hutchinson": other(
        "SOPHIA", recipe("fsdp2"), estimator="hutchinson", estimate_interval=1
    ),
    "zero-2 fp32 sophia, hutchinson by double backward": other(
        "SOPHIA",
        recipe("zero-2"),
        estimator="hutchinson",
        products="double_backward",
        estimate_interval=1,
    ),
    "fsdp2 fp32 lora sophia": other("SOPHIA", recipe("fsdp2", model="tiny-t5", peft=LORA), momentum=0.5),
    "zero-2 fp32 psgd, newton": other("PSGD", recipe("zero-2"), form="newton", refresh_interval=1),
    "ddp fp32 lora psgd": other("PSGD", recipe("ddp", model="tiny-t5", peft=LORA), momentum=0.5),
    "zero-2 fp32 inverses": recipe("zero-2", params={"apply": "inverse"}),
    "zero-2 bf16 accumulated": recipe("zero-2", "bf16", gas=2),
    "zero-2 fp32 lora accumulated at the owners": recipe(
        "zero-2", model="tiny-t5", peft=LORA, gas=2, params={"accumulate": "owner", "bucket_mb": 0.01}
    ),
    "ddp fp32 narrow on the wire": recipe("ddp", params={"wire_dtype": "bfloat16"}),
    "zero-2 bf16 summed in fp32, adapters": recipe("zero-2", "bf16", "tiny-bert", ADAPTER, **FP32),
    "zero-3 bf16 low rank": recipe("zero-3", "bf16", params=LOW),
    "zero-3 fp32 on every rank": recipe("zero-3", params={"strategy": "communication_optimal"}),
    "fsdp2 fp32 dense": recipe("fsdp2", model="tiny-roberta"),
    "fsdp2 bf16 lora accumulated": recipe("fsdp2", "bf16", "tiny-t5", LORA, 2),
    "ddp bf16 blocks": recipe("ddp", "bf16", params=BLOCKS),
    "ddp fp32 adamw": adamw(recipe("ddp")),
}
ONE_RANK: dict[str, dict[str, Any]] = {
    "zero-1 bf16 dense": recipe("zero-1", "bf16"),
    "zero-2 fp32 adamw": adamw(recipe("zero-2")),
    "zero-3 fp32 blocks": recipe("zero-3", params=BLOCKS),
    "fsdp2 fp32 low rank": recipe("fsdp2", params=LOW),
    "single bf16 lora accumulated": recipe("single", "bf16", "tiny-t5", LORA, 2),
    "single fp32 psgd, newton by double backward": other(
        "PSGD", recipe("single"), form="newton", products="double_backward", refresh_interval=1
    ),
}


def on_meta(written: Recipe) -> torch.nn.Module:
    """The model of a recipe, without weights."""
    config = written.dsso
    task = tasks.load_task(config.task, 0)
    dtype = written.precision.torch_dtype
    return tasks.outline.on_meta(config.model, config.peft, task, config.task, dtype).model


def planned(raw: dict[str, Any], world_size: int, gpu_gb: float | None = None) -> Plan:
    """The plan of a recipe."""
    written = load_recipe(raw)
    return plan(on_meta(written), written, world_size, gpu_gb)
