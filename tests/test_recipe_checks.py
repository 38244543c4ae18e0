"""What a recipe must not hold: keys, types, values and combinations; each message is read."""

from __future__ import annotations

from typing import Any

import pytest

from dsso.ds_keys import (
    FIXED,
    FIXED_FOR_METHODS,
    OFF,
    REMOVED,
    RENAMED,
    TOP_LEVEL,
    WITHOUT_DEEPSPEED,
)
from dsso.errors import RecipeError
from dsso.optim import available
from dsso.recipe import load_recipe
from tests.recipes import ADAMW, BASE, load, message

METHODS = ", ".join(available())

WRONG: list[tuple[dict[str, Any], list[str]]] = [
    # unknown keys, at every level
    (
        {"gradient_cliping": 1.0},
        [
            "gradient_cliping: unknown key",
            "nearest: 'gradient_clipping'",
            "remedy: write 'gradient_clipping'",
        ],
    ),
    ({"xyzzy": 1}, ["xyzzy: unknown key", "allowed: activation_checkpointing", "remove it from the recipe"]),
    ({"task": {"name": "rte"}}, ["task: unknown key", "remedy: move it to dsso.task"]),
    (
        {"zero_optimization.stages": 2},
        ["zero_optimization.stages: unknown key", "nearest: 'stage'", "remedy: write 'stage'"],
    ),
    ({"zero_optimization.offload_optimizer": {"devise": "cpu"}}, ["offload_optimizer.devise", "'device'"]),
    ({"bf16.enable": True}, ["bf16.enable: unknown key", "nearest: 'enabled'"]),
    ({"fp16.loss_scales": 1}, ["fp16.loss_scales: unknown key", "nearest: 'loss_scale'"]),
    ({"data_types.grad_accum": "fp32"}, ["data_types.grad_accum: unknown key", "'grad_accum_dtype'"]),
    ({"optimizer.param": {}}, ["optimizer.param: unknown key", "nearest: 'params'"]),
    (
        {"optimizer.params.dampening": 0.1},
        ["optimizer.params.dampening: unknown key", "nearest: 'damping'", "remedy: correct or remove"],
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
        ["scheduler.params.warmup_steps: unknown key", "nearest: 'warmup_num_steps'"],
    ),
    ({"dsso.train.max_step": 3}, ["dsso.train.max_step: unknown key", "nearest: 'max_steps'"]),
    ({"tensorboard.enable": True}, ["tensorboard.enable: unknown key", "nearest: 'enabled'"]),
    # wrong types
    ({"train_batch_size": "16"}, ["train_batch_size: has a wrong type", "got: '16'", "type integer"]),
    ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown: has a wrong type", "type boolean"]),
    ({"zero_optimization": True}, ["zero_optimization: has a wrong type", 'write {"stage": 1}']),
    ({"zero_optimization": 2}, ["zero_optimization: has a wrong type", "got: 2"]),
    ({"optimizer": "KFAC"}, ["optimizer: has a wrong type", "got: 'KFAC'"]),
    ({"optimizer.params": [1]}, ["optimizer.params: must be an object", "got: [1]"]),
    ({"zero_optimization.leaf_module": 3}, ["zero_optimization.leaf_module: must be an object"]),
    ({"bf16.enabled": "yes"}, ["bf16.enabled: has a wrong type", "got: 'yes'", "true, false, auto"]),
    ({"dsso": 3}, ["dsso: must be an object", "got: 3"]),
    # optimizers and schedulers
    (
        {"optimizer": ...},
        [
            "optimizer: is required and missing",
            f"{METHODS}, AdamW, Adam, SGD",
            "remedy: add",
        ],
    ),
    (
        {"optimizer.type": "KFACC"},
        [
            "optimizer.type: unknown optimizer",
            "nearest: 'KFAC'",
            f"allowed: {METHODS}, AdamW",
            "write 'KFAC'",
        ],
    ),
    ({"optimizer.type": 3}, ["optimizer.type: unknown optimizer", "got: 3"]),
    ({"optimizer.params.tau": 0}, ["optimizer.params.tau", "got: 0.0", "allowed: > 0"]),
    ({"optimizer.params.damping": -0.1}, ["optimizer.params.damping", "got: -0.1"]),
    ({"optimizer.params.inverse_interval": 0}, ["optimizer.params.inverse_interval", "at least 1"]),
    ({"optimizer.params.factor_interval": [[0, 1], [5, -1]]}, ["factor_interval", "segment 1"]),
    ({"optimizer.params.lr": "0.1"}, ["optimizer.params.lr", "got: '0.1'", "allowed: number"]),
    ({"optimizer.params.clip": "after"}, ["optimizer.params.clip: is not one of", "none, pre, post"]),
    ({"scheduler": {"type": "WarmupDecay"}}, ["scheduler.type: unknown scheduler", "'WarmupDecayLR'"]),
    ({"scheduler": {"type": ["x"]}}, ["scheduler.type: unknown scheduler"]),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
        ["scheduler.params.warmup_num_steps", "greater than or equal to 1"],
    ),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5, "warmup_num_steps": 9}}},
        ["warm-up is longer than the whole schedule of 5 steps", "got: 9", "from 1 to 5"],
    ),
    # "auto" where nothing fills it in
    ({"optimizer.params.lr": "auto"}, ["optimizer.params.lr: 'auto' cannot be filled in", "warmup_max_lr"]),
    ({"optimizer.params.base": {"lr": "auto"}}, ["optimizer.params.base.lr: 'auto' cannot be filled in"]),
    ({"steps_per_print": "auto"}, ["steps_per_print: 'auto' cannot be filled in", "remedy: write the value"]),
    ({"fp16.loss_scale": "auto"}, ["fp16.loss_scale: 'auto' cannot be filled in"]),
    ({"zero_optimization.stage": "auto"}, ["zero_optimization.stage: 'auto'", "allowed: 0, 1, 2, 3"]),
    ({"bf16.enabled": "auto"}, ["bf16.enabled: 'auto'", "dsso.model.dtype is 'auto' as well", "'bfloat16'"]),
    ({"aio": {"block_size": ["auto"]}}, ["aio.block_size[0]: 'auto' cannot be filled in"]),
    # ZeRO and precision
    ({"zero_optimization.stage": 4}, ["zero_optimization.stage: is not a ZeRO stage", "got: 4"]),
    ({"zero_optimization.stage": True}, ["is not a ZeRO stage", "got: True"]),
    ({"zero_optimization.stage": [1]}, ["is not a ZeRO stage", "got: [1]"]),
    (
        {"zero_optimization.round_robin_gradients": True, "zero_optimization.stage": 2},
        ["zero_optimization.round_robin_gradients", "(stage 2)", "for ever", "remedy: remove it"],
    ),
    (
        {"fp16.enabled": True, "zero_optimization.stage": 0},
        ["fp16.enabled: fp16 does not work with ZeRO stage 0", "loss scale", '{"stage": 1}', "use bf16"],
    ),
    ({"fp16.enabled": True, "zero_optimization": ...}, ["fp16 does not work with ZeRO stage 0"]),
    (
        {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32", "zero_optimization.stage": 0},
        [
            "data_types.grad_accum_dtype: gradients of bfloat16 weights cannot be accumulated in float32",
            "at ZeRO stage 0",
            "allowed: bf16",
            "set zero_optimization.stage to 1 or more",
        ],
    ),
    ({"data_types.grad_accum_dtype": "bf16"}, ["gradients of float32 weights", "allowed: fp32"]),
    ({"data_types.grad_accum_dtype": "float"}, ["data_types.grad_accum_dtype: is no number format", "fp32"]),
    ({"fp16.enabled": True, "bf16.enabled": True}, ["fp16 and bf16 are both enabled"]),
    ({"fp16": {"enabled": True, "loss_scale": -1}}, ["fp16.loss_scale: is no loss scale", "0 is dynamic"]),
    (
        {"bf16.enabled": True, "dsso.model": {"name": "tiny-t5", "dtype": "float32"}},
        ["dsso.model.dtype: contradicts bf16.enabled, which is true", "set dsso.model.dtype to 'auto'"],
    ),
    (
        {"bf16.enabled": False, "dsso.model": {"name": "tiny-t5", "dtype": "bfloat16"}},
        ["dsso.model.dtype: contradicts bf16.enabled, which is false", "bf16.enabled to true"],
    ),
    # what the methods of dsso cannot work with
    (
        {"gradient_clipping": 1.0},
        [
            "gradient_clipping: KFAC clips by itself",
            "got: 1.0",
            "optimizer.params.clip",
            "optimizer.params.tau",
        ],
    ),
    (
        {"zero_optimization.offload_optimizer": {"device": "cpu"}, "zero_optimization.stage": 2},
        ["offload_optimizer.device", "with KFAC in this version (stage 2)", "got: 'cpu'", "remedy: remove"],
    ),
    ({"zero_optimization.offload_param": {"device": "nvme"}}, ["offload_param.device", "got: 'nvme'"]),
    (
        {"zero_optimization.sub_group_size": 1000, "zero_optimization.stage": 3},
        ["zero_optimization.sub_group_size: at stage 3", "one sub-group", "remedy: remove it"],
    ),
    # engines
    ({"dsso.engine": "single"}, ["zero_optimization.stage: the engine 'single'", "(stage 1)", "'deepspeed'"]),
    (
        {"dsso.engine": "fsdp2", "fp16.enabled": True},
        ["fp16.enabled: fp16 needs DeepSpeed's loss scaling", "engine is 'fsdp2'", "or use bf16"],
    ),
    (
        {"dsso.engine": "ddp", "data_types.grad_accum_dtype": "bf16"},
        ["data_types.grad_accum_dtype: the engine 'ddp' accumulates", "allowed: fp32", "remedy: remove it"],
    ),
    (
        {"dsso.engine": "fsdp2", "tensorboard.enabled": True},
        ["tensorboard: is done by DeepSpeed's engine", "'fsdp2'", "set dsso.engine to 'deepspeed'"],
    ),
    ({"dsso.engine": "ddp", "wall_clock_breakdown": True}, ["wall_clock_breakdown: is done by DeepSpeed's"]),
    (
        {
            "dsso.engine": "fsdp2",
            "zero_optimization.offload_param": {"device": "cpu"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        },
        ["offload_param.device: is done by DeepSpeed's engine", "nothing is offloaded", "allowed: none"],
    ),
    (
        {
            "dsso.engine": "ddp",
            "zero_optimization.zero_hpz_partition_size": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        },
        ["zero_hpz_partition_size: is done by DeepSpeed's engine", "allowed: 1"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: ",".join(value)[:50])
def test_what_is_wrong_is_told_with_place_and_remedy(changes: dict[str, Any], parts: list[str]) -> None:
    told = message(changes)
    for part in parts:
        assert part in told, told


@pytest.mark.parametrize("path", sorted(REMOVED))
def test_keys_that_deepspeed_removed_are_refused(path: str) -> None:
    assert f"{path}: was removed from DeepSpeed" in message({path: {}})


@pytest.mark.parametrize("path", sorted(RENAMED))
def test_old_names_are_told_their_new_one(path: str) -> None:
    told = message({path: {}})
    assert f"{path}: is an old name" in told
    assert f"write {RENAMED[path]} instead" in told


def other(works: object) -> object:
    """A value that is not the one that works."""
    others: dict[object, object] = {"mean": "sum", 1: 2, 0: 2, None: {}}
    return (not works) if isinstance(works, bool) else others[works]


@pytest.mark.parametrize("path", sorted(FIXED_FOR_METHODS))
def test_settings_that_break_a_method_are_refused_for_methods_only(path: str) -> None:
    works, why = FIXED_FOR_METHODS[path]
    assert f"{path}: does not work with KFAC: {why}" in message({path: other(works)})
    load({path: works})
    load({path: other(works)}, ADAMW)


@pytest.mark.parametrize("path", sorted(FIXED_FOR_METHODS))
def test_the_same_settings_are_refused_for_methods_from_forward_passes(path: str) -> None:
    works, _ = FIXED_FOR_METHODS[path]
    base = {**BASE, "optimizer": {"type": "MeZO", "params": {}}}
    assert f"{path}: does not work with MEZO: " in message({path: other(works)}, base)
    load({path: works}, base)


@pytest.mark.parametrize(
    ("directions", "told"),
    [
        (3, "3 direction(s)"),
        ({"type": "piecewise", "points": [[0, 4], [5, 6]]}, "6 direction(s)"),
        ({"type": "linear", "start": 4, "end": 8, "steps": 10}, "a ramp of"),
        ({"type": "piecewise", "points": [[0, 4], [5, 8]]}, None),
    ],
)
def test_directions_of_its_own_for_every_rank_have_to_be_shared_evenly(
    directions: Any, told: str | None
) -> None:
    params = {"directions": directions, "spread": True}
    recipe = load({}, {**BASE, "optimizer": {"type": "MeZO", "params": params}})
    recipe.resolved(1)
    if told is None:
        recipe.resolved(4)
        return
    with pytest.raises(RecipeError, match="cannot be spread evenly over 4 ranks") as caught:
        recipe.resolved(4)
    assert told in str(caught.value)


@pytest.mark.parametrize("path", sorted(FIXED))
def test_settings_that_break_the_run_are_refused_for_all(path: str) -> None:
    works, why = FIXED[path]
    for base in (BASE, ADAMW):
        assert f"{path}: does not work with dsso: {why}" in message({path: other(works)}, base)
        load({path: works}, base)


def test_offloading_is_left_to_baselines() -> None:
    changes = {"zero_optimization.offload_optimizer": {"device": "cpu"}}
    assert load(changes, ADAMW).resolved(2).ds_config["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu"
    }
    load({"zero_optimization.offload_optimizer": {"device": "none"}})


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_other_engines_say_what_takes_the_place_of_zero(engine: str) -> None:
    changes = {"dsso.engine": engine, "zero_optimization": {"stage": 3, "overlap_comm": True}}
    recipe = load({**changes, "bf16.enabled": True, "wall_clock_breakdown": False, "steps_per_print": 5})
    assert len(recipe.notes) == 1
    assert (
        f"zero_optimization (stage, overlap_comm) is DeepSpeed's and is not used: {engine} "
        in recipe.notes[0]
    )
    resolved = recipe.resolved(2)
    assert "zero_optimization" not in resolved.ds_config
    assert (resolved.zero_stage, resolved.precision.accumulation) == (0, "float32")
    # the resolved recipe reads back, with nothing left to say
    again = load_recipe(resolved.to_json())
    assert again.notes == ()
    assert again.resolved(2).ds_config == resolved.ds_config
    assert load({"dsso.engine": engine, "zero_optimization": {"stage": 0}}).notes == ()
    assert load(changes | {"dsso.engine": "deepspeed"}).notes == ()


def test_every_key_of_deepspeed_is_allowed_off_or_refused_under_other_engines() -> None:
    for key, kind in TOP_LEVEL.items():
        off: dict[str, Any] = {"boolean": False, "object": {}, "number": OFF.get(key, 0.0)}
        if key not in WITHOUT_DEEPSPEED and kind in off:
            load({"dsso.engine": "ddp", key: off[kind]})
