"""Checks of the part of a recipe that DeepSpeed reads: keys, types, and combinations that cannot work.

Every function raises `RecipeError` with the path, the value, what is allowed and what to do, or returns what
it read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dsso.config import DssoConfig, removal
from dsso.ds_keys import (
    BATCH_KEYS,
    FIXED,
    FIXED_FOR_METHODS,
    OFF,
    REMOVED,
    RENAMED,
    SECTIONS,
    TOP_LEVEL,
    WITHOUT_DEEPSPEED,
    ZERO_WITHOUT_DEEPSPEED,
    Fixed,
    Kind,
)
from dsso.errors import RecipeError, nearest

Dtype = Literal["float32", "bfloat16", "float16"]

SUB_GROUP_SIZE = 10**12
"""Elements in a sub-group of ZeRO stage 3 that hold all trainable parameters of any model."""

LAYOUTS = {
    "fsdp2": "fsdp2 shards weights, gradients and optimizer state over all ranks",
    "ddp": "ddp keeps weights, gradients and moments whole on every rank",
}
"""Engines that bring their own layout in the place of ZeRO's, and which."""

_SHORT: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_KINDS: dict[Kind, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "object": (Mapping,),
    "any": (object,),
}
_NAMES_ANYWHERE = {"data_types.keep_in_fp32_modules", "pipeline.stages"}
"""Paths where DeepSpeed itself knows what `"auto"` means."""

_OF_METHODS = {f"optimizer.params.{name}" for name in ("share_inputs", "apply", "sides")}
"""Paths where `"auto"` is a choice of the method's own."""

_FILLED = {
    *BATCH_KEYS,
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
}
"""Paths where dsso fills in `"auto"`; in `zero_optimization` it stands for DeepSpeed's default."""


@dataclass(frozen=True)
class Precision:
    """In which numbers a run computes."""

    dtype: Dtype
    """Type of the weights in the forward pass."""
    loss_scale: float | Literal["none", "dynamic"]
    """fp16 only: a fixed scale, or `dynamic`."""
    accumulation: Dtype
    """Type in which gradients are summed over the accumulation window."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own."""
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return kinds[self.dtype]


def section(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The object at a dotted path, empty when it is not there."""
    found: Any = raw
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def lookup(raw: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path."""
    home, _, name = path.rpartition(".")
    return (section(raw, home) if home else raw).get(name, default)


def check_keys(raw: Mapping[str, Any]) -> None:
    """Every key is one that dsso or DeepSpeed reads, and holds a value of the right JSON type."""
    for key, value in raw.items():
        if key == "dsso":
            continue
        _check_name(key, key, [*TOP_LEVEL, "dsso"])
        kind = TOP_LEVEL[key]
        if value != "auto" and not _is(value, kind):
            remedy = 'write {"stage": 1}, or another stage' if key == "zero_optimization" else None
            raise RecipeError(
                "has a wrong type", where=key, got=value, allowed=f"a value of type {kind}", remedy=remedy
            )
    for path, keys in SECTIONS.items():
        for key, value in section(raw, path).items():
            _check_name(f"{path}.{key}", key, keys)
            if f"{path}.{key}" in SECTIONS and value is not None and not isinstance(value, Mapping):
                raise RecipeError("must be an object", where=f"{path}.{key}", got=value)
    for path in ("fp16.enabled", "bf16.enabled"):
        if not isinstance(lookup(raw, path, False), bool) and lookup(raw, path) != "auto":
            raise RecipeError(
                "has a wrong type", where=path, got=lookup(raw, path), allowed="true, false, auto"
            )


def _is(value: object, kind: Kind) -> bool:
    if isinstance(value, bool):
        return kind in {"boolean", "any"}
    return isinstance(value, _KINDS[kind])


def _check_name(path: str, key: str, known: Iterable[str]) -> None:
    if path in REMOVED:
        raise RecipeError("was removed from DeepSpeed and has no effect", where=path, remedy="remove the key")
    if path in RENAMED:
        raise RecipeError("is an old name", where=path, got=key, remedy=f"write {RENAMED[path]} instead")
    options = sorted(known)
    if key in options:
        return
    home = path.rpartition(".")[0]
    close = nearest(key, options)
    remedy = f"write {close!r}" if close else f"remove it from {home or 'the recipe'}"
    if not home and key in DssoConfig.model_fields:
        # not mistyped but misplaced: the list of DeepSpeed's keys would only distract
        raise RecipeError("unknown key", where=path, got=key, remedy=f"move it to dsso.{key}")
    raise RecipeError("unknown key", where=path, got=key, allowed=options, remedy=remedy)


def check_auto(raw: Mapping[str, Any]) -> None:
    """`"auto"` stands only where something fills it in."""
    for path in _autos({key: value for key, value in raw.items() if key != "dsso"}):
        if path in _NAMES_ANYWHERE | _OF_METHODS | _FILLED or path.startswith("zero_optimization."):
            continue
        raise RecipeError(
            "'auto' cannot be filled in here",
            where=path,
            got="auto",
            remedy="write the value; 'auto' works for the sizes of zero_optimization and for "
            + ", ".join(sorted(_FILLED)),
        )
    if lookup(raw, "zero_optimization.stage") == "auto":
        raise RecipeError(
            "'auto' cannot be filled in here",
            where="zero_optimization.stage",
            got="auto",
            allowed="0, 1, 2, 3",
            remedy="write the stage: 1 shards optimizer state, 2 gradients too, 3 the model too",
        )


def _autos(value: object, path: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{path}[{index}]")
    elif value == "auto":
        yield path


def zero_stage(raw: Mapping[str, Any], engine: str) -> int:
    """The ZeRO stage, checked against the engine and for what breaks at any stage."""
    stage = lookup(raw, "zero_optimization.stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise RecipeError(
            "is not a ZeRO stage", where="zero_optimization.stage", got=stage, allowed="0, 1, 2, 3"
        )
    if engine == "single" and stage != 0:
        raise RecipeError(
            f"the engine 'single' has one device and cannot shard (stage {stage})",
            where="zero_optimization.stage",
            got=stage,
            allowed="0",
            remedy="set dsso.engine to 'deepspeed', or remove zero_optimization"
            " (on the command line: --set zero_optimization=null)",
        )
    if lookup(raw, "zero_optimization.round_robin_gradients", False) not in (False, "auto"):
        raise RecipeError(
            f"round_robin_gradients does not work (stage {stage}): DeepSpeed then deals out the gradients in "
            "another order than its own map of partitions says, and ranks wait for each other for ever",
            where="zero_optimization.round_robin_gradients",
            got=lookup(raw, "zero_optimization.round_robin_gradients"),
            allowed="false",
            remedy=removal("zero_optimization.round_robin_gradients"),
        )
    return 0 if engine in LAYOUTS else int(stage)


def notes_for_engine(raw: Mapping[str, Any], engine: str) -> tuple[str, ...]:
    """Check what only DeepSpeed's engine does, and say what another engine does in its place.

    Args:
        raw: the recipe.
        engine: `dsso.engine`.

    Returns:
        Notes for the user.

    Raises:
        RecipeError: for a setting that would be ignored in silence.
    """
    if engine == "deepspeed":
        return ()
    for key, value in raw.items():
        if key != "dsso" and key not in WITHOUT_DEEPSPEED and not _is_off(key, value):
            raise RecipeError(
                f"is done by DeepSpeed's engine, and the engine is {engine!r}",
                where=key,
                got=value,
                remedy=removal(key, ", or set dsso.engine to 'deepspeed'"),
            )
    for path, (works, holds) in ZERO_WITHOUT_DEEPSPEED.items():
        value = lookup(raw, path, works)
        if value not in (works, "auto"):
            raise RecipeError(
                f"is done by DeepSpeed's engine; under the engine {engine!r} {holds}",
                where=path,
                got=value,
                allowed=str(works).lower(),
                remedy=removal(path, ", or set dsso.engine to 'deepspeed'"),
            )
    given = section(raw, "zero_optimization")
    if engine not in LAYOUTS or not given.get("stage"):
        return ()
    return (f"zero_optimization ({', '.join(given)}) is DeepSpeed's and is not used: {LAYOUTS[engine]}",)


def _is_off(key: str, value: object) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False
    return value is None or value is False or (key in OFF and value == OFF[key])


def precision(raw: Mapping[str, Any], dsso: DssoConfig, stage: int, gradients: bool = True) -> Precision:
    """The number formats, after the `fp16`, `bf16` and `data_types` sections and `dsso.model.dtype` agree.

    Args:
        raw: the recipe.
        dsso: its section.
        stage: ZeRO stage.
        gradients: the method takes them; without them there is no loss to scale.

    Raises:
        RecipeError: formats that are unknown, or do not work together.
    """
    dtype = _dtype(raw, dsso.model.dtype)
    if not gradients:
        return Precision(dtype, "none", "float32")
    given = lookup(raw, "data_types.grad_accum_dtype")
    if given is not None and given not in _SHORT:
        raise RecipeError(
            "is no number format", where="data_types.grad_accum_dtype", got=given, allowed=list(_SHORT)
        )
    if dsso.engine in LAYOUTS:
        return _without_deepspeed(dtype, given, dsso.engine)
    accumulation = dtype if given is None else _SHORT[given]
    if dtype == "float16" and stage == 0:
        raise RecipeError(
            "fp16 does not work with ZeRO stage 0: DeepSpeed divides the gradients by the loss scale without "
            "ever having multiplied the loss by it",
            where="fp16.enabled",
            got=f"fp16 with zero_optimization.stage {stage}",
            allowed="fp16 with stage 1, 2 or 3; bf16 or fp32 with any stage",
            remedy='set "zero_optimization": {"stage": 1}, or use bf16',
        )
    if accumulation not in (dtype, "float32") or (stage == 0 and accumulation != dtype):
        allowed = [
            short for short, name in _SHORT.items() if name == dtype or (name == "float32" and stage > 0)
        ]
        raise RecipeError(
            f"gradients of {dtype} weights cannot be accumulated in {accumulation} at ZeRO stage {stage}",
            where="data_types.grad_accum_dtype",
            got=given,
            allowed=allowed,
            remedy=removal(
                "data_types.grad_accum_dtype",
                ", or set zero_optimization.stage to 1 or more" if stage == 0 else "",
            ),
        )
    scale: float | Literal["none", "dynamic"] = "none"
    if dtype == "float16":
        fixed = lookup(raw, "fp16.loss_scale", 0)
        if isinstance(fixed, bool) or not isinstance(fixed, int | float) or fixed < 0:
            raise RecipeError(
                "is no loss scale", where="fp16.loss_scale", got=fixed, allowed="a number >= 0; 0 is dynamic"
            )
        scale = float(fixed) if fixed else "dynamic"
    return Precision(dtype, scale, accumulation)


def _without_deepspeed(dtype: Dtype, accumulation: str | None, engine: str) -> Precision:
    """Number formats of the engines that have no loss scaling and sum gradients in fp32."""
    if dtype == "float16":
        raise RecipeError(
            f"fp16 needs DeepSpeed's loss scaling, and the engine is {engine!r}",
            where="fp16.enabled",
            got=True,
            allowed="bf16 or fp32",
            remedy="set dsso.engine to 'deepspeed' with zero_optimization.stage 1, 2 or 3, or use bf16",
        )
    if accumulation not in (None, "fp32"):
        raise RecipeError(
            f"the engine {engine!r} accumulates gradients in fp32",
            where="data_types.grad_accum_dtype",
            got=accumulation,
            allowed="fp32",
            remedy=removal("data_types.grad_accum_dtype", ", or set dsso.engine to 'deepspeed'"),
        )
    return Precision(dtype, "none", "float32")


def _dtype(raw: Mapping[str, Any], asked: str) -> Dtype:
    enabled = {name: lookup(raw, f"{name}.enabled", False) for name in ("fp16", "bf16")}
    if enabled["fp16"] is True and enabled["bf16"] is True:
        raise RecipeError(
            "fp16 and bf16 are both enabled",
            where="bf16.enabled",
            got=True,
            remedy="remove one of the sections",
        )
    if asked == "auto":
        for name, state in enabled.items():
            if state == "auto":
                raise RecipeError(
                    "'auto' cannot be filled in, because dsso.model.dtype is 'auto' as well",
                    where=f"{name}.enabled",
                    got="auto",
                    allowed="true, false",
                    remedy=f"write true or false here, or set dsso.model.dtype, e.g. to {_SHORT[name]!r}",
                )
        return "float16" if enabled["fp16"] else "bfloat16" if enabled["bf16"] else "float32"
    for name, state in enabled.items():
        written = "enabled" in section(raw, name)
        if state != "auto" and written and state != (_SHORT[name] == asked):
            raise RecipeError(
                f"contradicts {name}.enabled, which is {str(state).lower()}",
                where="dsso.model.dtype",
                got=asked,
                remedy=f"set dsso.model.dtype to 'auto', or {name}.enabled to {str(not state).lower()}",
            )
    return {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}[asked]  # type: ignore[return-value]


def check_for_method(raw: Mapping[str, Any], method: str, stage: int) -> None:
    """What a baseline optimizer would survive, and a method of dsso would not."""
    clipping = raw.get("gradient_clipping", 0.0)
    if clipping != "auto" and clipping:
        raise RecipeError(
            f"{method} clips by itself, and DeepSpeed's clipping would come on top of it",
            where="gradient_clipping",
            got=clipping,
            allowed="0, or no gradient_clipping at all",
            remedy="set optimizer.params.clip to 'pre' (gradient) or 'post' (Newton step), and its bound as "
            "optimizer.params.tau",
        )
    for name in ("offload_optimizer", "offload_param"):
        device = lookup(raw, f"zero_optimization.{name}.device", "none")
        if device != "none":
            raise RecipeError(
                f"{name} does not work together with {method} in this version (stage {stage})",
                where=f"zero_optimization.{name}.device",
                got=device,
                allowed="none",
                remedy=removal(
                    f"zero_optimization.{name}", "; stage 3 shards the same memory over the ranks"
                ),
            )
    size = lookup(raw, "zero_optimization.sub_group_size", "auto")
    if stage == 3 and size not in ("auto", SUB_GROUP_SIZE):
        raise RecipeError(
            f"at stage 3, {method} needs all trainable parameters in one sub-group: the step is clipped "
            "by the norm over all of them",
            where="zero_optimization.sub_group_size",
            got=size,
            allowed="auto",
            remedy=removal("zero_optimization.sub_group_size", f"; dsso sets {SUB_GROUP_SIZE}"),
        )
    _check_fixed(raw, FIXED_FOR_METHODS, method)


def check_objective(objective: str, method: str, forward: Iterable[str]) -> None:
    """Whether a method can lower what the recipe asks for.

    Args:
        objective: `dsso.train.objective`.
        method: `optimizer.type`.
        forward: methods that need only losses.
    """
    if objective != "loss" and method not in forward:
        raise RecipeError(
            f"{method} needs gradients of the loss, so it cannot lower another objective",
            where="dsso.train.objective",
            got=objective,
            allowed="loss",
            remedy=removal(
                "dsso.train.objective", f", or take a method that needs only losses: {', '.join(forward)}"
            ),
        )


def check_fixed(raw: Mapping[str, Any]) -> None:
    """What neither the methods nor the baselines can work with."""
    _check_fixed(raw, FIXED, "dsso")


def _check_fixed(raw: Mapping[str, Any], table: Fixed, who: str) -> None:
    for path, (works, why) in table.items():
        value = lookup(raw, path, works)
        if value not in (works, "auto"):
            allowed = str(works).lower()
            raise RecipeError(
                f"does not work with {who}: {why}",
                where=path,
                got=value,
                allowed=allowed,
                remedy=removal(path),
            )


def batch_sizes(raw: Mapping[str, Any], world_size: int) -> tuple[int, int, int]:
    """Micro-batch size, accumulation steps and global batch size, filled in as DeepSpeed does.

    Args:
        raw: the recipe.
        world_size: number of ranks, each with its own share of the global batch.
    """
    sizes: dict[str, int | None] = {}
    for key in BATCH_KEYS:
        value = raw.get(key, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise RecipeError("is no batch size", where=key, got=value, allowed="an integer >= 1, or auto")
        sizes[key] = None if value == "auto" else value
    total, micro, steps = (sizes[key] for key in BATCH_KEYS)
    if total is None and micro is None:
        raise RecipeError(
            "no batch size is given" if steps is None else "is given without a batch size",
            where=BATCH_KEYS[2] if steps else BATCH_KEYS[0],
            got=steps,
            remedy=f"set {BATCH_KEYS[0]} (examples per step, over all ranks) or {BATCH_KEYS[1]}",
        )
    if total is None:
        assert micro is not None  # one of the two is given, see above
        steps = steps or 1
        return micro, steps, micro * steps * world_size
    if micro is None:
        micro = total // ((steps or 1) * world_size)
    if steps is None:
        steps = total // (micro * world_size) if micro else 0
    if micro * steps * world_size != total:
        raise RecipeError(
            f"the batch of {total} cannot be cut into {world_size} ranks x "
            f"{sizes[BATCH_KEYS[2]] or 'any number of'} accumulation steps x "
            f"{sizes[BATCH_KEYS[1]] or 'any number of'} examples",
            where=BATCH_KEYS[0],
            got=total,
            allowed=f"a multiple of {(sizes[BATCH_KEYS[1]] or 1) * (sizes[BATCH_KEYS[2]] or 1) * world_size}"
            if None in sizes.values()
            else f"{micro} x {steps} x {world_size} = {micro * steps * world_size}",
            remedy=f"change {BATCH_KEYS[0]}, or the number of ranks, or leave the other two sizes 'auto'",
        )
    return micro, steps, total
