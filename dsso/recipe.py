"""One JSON file is one experiment: read it, check all of it, fill in every `"auto"`.

    recipe = load_recipe("configs/kfac_minilm_mrpc_lora.json", ["dsso.train.max_steps=50"])
    resolved = recipe.resolved(world_size=2)
    resolved.ds_config            # what DeepSpeed gets
    resolved.optimizer_config     # the parameters of the method, a pydantic object

Everything is checked before a process group or a device is touched; what is wrong becomes a `RecipeError`.
`python -m dsso FILE …` checks files, `python -m dsso --schema` prints the JSON Schema.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dsso import optim
from dsso.config import DssoConfig, StrictModel, parse
from dsso.ds_keys import BATCH_KEYS, SECTIONS, TOP_LEVEL
from dsso.errors import DssoError, RecipeError, nearest
from dsso.recipe_checks import (
    LAYOUTS,
    SUB_GROUP_SIZE,
    Precision,
    batch_sizes,
    check_auto,
    check_fixed,
    check_for_method,
    check_keys,
    check_objective,
    lookup,
    notes_for_engine,
    precision,
    section,
    zero_stage,
)
from dsso.recipe_forward import check_for_forward, check_for_ranks
from dsso.recipe_models import BASELINES, SCHEDULERS, WARMUP_SHARE, BaselineConfig, without_none
from dsso.recipe_monitors import check_monitors
from dsso.recipe_products import check_products

__all__ = ["BaselineConfig", "Precision", "Recipe", "ResolvedRecipe", "load_recipe"]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe for a known number of ranks, with nothing left to guess."""

    ds_config: dict[str, Any]
    """What DeepSpeed parses: no `"dsso"` section, and no optimizer when the method is dsso's."""
    optimizer_type: str
    """Name of the method or of the baseline."""
    optimizer_config: StrictModel
    """Its parameters: `Config` of the method's module, or a `BaselineConfig`."""
    is_method: bool
    """True for a method of dsso, false for a baseline."""
    dsso: DssoConfig
    """The `"dsso"` section."""
    world_size: int
    """Number of ranks."""
    micro_batch: int
    """Examples per rank and forward pass."""
    gas: int
    """Forward and backward passes per step (gradient accumulation steps)."""
    global_batch: int
    """Examples per step over all ranks: micro_batch * gas * world_size."""
    precision: Precision
    """Number formats."""
    zero_stage: int
    """ZeRO stage, 0 to 3; 0 under engines with a layout of their own."""
    notes: tuple[str, ...] = ()
    """What the user should know about the engine."""

    def to_json(self) -> dict[str, Any]:
        """The recipe in full; `load_recipe` reads it back to the same thing."""
        params = self.optimizer_config.model_dump(mode="json")
        written = copy.deepcopy(self.ds_config)
        written["optimizer"] = {"type": self.optimizer_type, "params": params}
        written["dsso"] = self.dsso.model_dump(mode="json")
        return written


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed every check that needs no number of ranks."""

    raw: dict[str, Any]
    """What was written, overrides applied."""
    optimizer_type: str
    """Name of the method or of the baseline."""
    optimizer_config: StrictModel
    """Its parameters."""
    is_method: bool
    """True for a method of dsso, false for a baseline."""
    dsso: DssoConfig
    """The `"dsso"` section."""
    precision: Precision
    """Number formats."""
    zero_stage: int
    """ZeRO stage, 0 to 3; 0 under engines with a layout of their own."""
    notes: tuple[str, ...] = ()
    """What the user should know about the engine."""

    def resolved(self, world_size: int, steps: int | None = None) -> ResolvedRecipe:
        """Fill in what depends on the number of ranks and on the length of the run.

        Args:
            world_size: number of ranks.
            steps: length of the run in optimizer steps, for recipes that give epochs; else `train.max_steps`.

        Raises:
            RecipeError: batch sizes that do not divide, or an `"auto"` that cannot be filled in.
        """
        if self.dsso.engine == "single" and world_size != 1:
            raise RecipeError(
                f"the engine 'single' has one process, and {world_size} were started",
                where="dsso.engine",
                got="single",
                allowed=["deepspeed", "fsdp2", "ddp"],
                remedy="set dsso.engine to one of these, or start one process: python launch/train.py …",
            )
        micro, gas, total = batch_sizes(self.raw, world_size)
        check_for_ranks(self.optimizer_config, world_size)
        return ResolvedRecipe(
            ds_config=self._ds_config(dict(zip(BATCH_KEYS, (total, micro, gas), strict=True)), steps),
            optimizer_type=self.optimizer_type,
            optimizer_config=self.optimizer_config,
            is_method=self.is_method,
            dsso=self.dsso,
            world_size=world_size,
            micro_batch=micro,
            gas=gas,
            global_batch=total,
            precision=self.precision,
            zero_stage=self.zero_stage,
            notes=self.notes,
        )

    def _ds_config(self, batch: dict[str, int], steps: int | None) -> dict[str, Any]:
        filled = {k: copy.deepcopy(v) for k, v in self.raw.items() if k not in {"dsso", "optimizer"}} | batch
        zero = {k: v for k, v in section(self.raw, "zero_optimization").items() if v != "auto"}
        filled["zero_optimization"] = zero | {"stage": self.zero_stage}
        if self.dsso.engine in LAYOUTS:
            del filled["zero_optimization"]
        for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
            if name in self.raw or self.precision.dtype == dtype:
                filled[name] = section(self.raw, name) | {"enabled": self.precision.dtype == dtype}
        if "scheduler" in self.raw:
            filled["scheduler"] = self._scheduler(steps)
        # DeepSpeed's default is to clip the gradient at 1.0, unseen
        clipping = self.raw.get("gradient_clipping", 0.0)
        filled["gradient_clipping"] = 0.0 if clipping == "auto" else float(clipping)
        filled["zero_allow_untested_optimizer"] = True
        if self.is_method:
            if self.zero_stage == 3:
                filled["zero_optimization"]["sub_group_size"] = SUB_GROUP_SIZE
        else:
            filled["optimizer"] = {"type": self.optimizer_type, "params": without_none(self.optimizer_config)}
        return filled

    def _scheduler(self, steps: int | None) -> dict[str, Any]:
        kind, model = _scheduler(self.raw)
        params = without_none(model)
        steps = self.dsso.train.max_steps if steps is None else steps
        for name in ("total_num_steps", "warmup_num_steps"):
            if params.get(name) == "auto" and steps is None:
                raise RecipeError(
                    "'auto' cannot be filled in: with dsso.train.epochs the number of steps is not known",
                    where=f"scheduler.params.{name}",
                    got="auto",
                    allowed="an integer >= 1",
                    remedy="set dsso.train.max_steps instead of epochs, or write the number of steps",
                )
        if steps is not None:
            auto = {"total_num_steps": steps, "warmup_num_steps": max(1, round(WARMUP_SHARE * steps))}
            params |= {name: value for name, value in auto.items() if params.get(name) == "auto"}
            total = params.get("total_num_steps", steps)
            if kind == "WarmupDecayLR" and total < steps:
                raise RecipeError(
                    f"the learning rate is zero from step {total} on, and the run has {steps} steps",
                    where="scheduler.params.total_num_steps",
                    got=total,
                    allowed=f"an integer >= {steps}, or auto",
                    remedy="write 'auto'",
                )
        _check_warmup(params)
        lr = getattr(self.optimizer_config, "lr", None)
        if params.get("warmup_min_lr") == "auto":
            params["warmup_min_lr"] = 0.0
        if "warmup_max_lr" in params:
            if params["warmup_max_lr"] == "auto":
                params["warmup_max_lr"] = lr
            elif lr is not None and params["warmup_max_lr"] != lr:
                raise RecipeError(
                    f"is the peak of the schedule and overrides optimizer.params.lr, which is {lr}",
                    where="scheduler.params.warmup_max_lr",
                    got=params["warmup_max_lr"],
                    allowed=f"{lr}, or auto",
                    remedy="write 'auto', and the peak as optimizer.params.lr",
                )
        return {"type": kind, "params": params}


def _check_warmup(params: Mapping[str, Any]) -> None:
    total, warmup = params.get("total_num_steps"), params.get("warmup_num_steps")
    if isinstance(total, int) and isinstance(warmup, int) and warmup > total:
        raise RecipeError(
            f"the warm-up is longer than the whole schedule of {total} steps",
            where="scheduler.params.warmup_num_steps",
            got=warmup,
            allowed=f"an integer from 1 to {total}, or auto",
            remedy="write 'auto', or fewer steps",
        )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: path of a JSON file, or the object itself.
        overrides: `"path.to.key=value"`, the value in JSON, or else taken as a string.

    Raises:
        RecipeError: for whatever would go wrong later.
    """
    raw = read_json(Path(source)) if isinstance(source, str | Path) else _plain(source)
    for override in overrides:
        _override(raw, override)
    for override in overrides:
        _drop_null(raw, override.partition("=")[0].strip())
    check_keys(raw)
    check_auto(raw)
    check_fixed(raw)
    dsso, (kind, model, is_method) = _sections(raw)
    stage = zero_stage(raw, dsso.engine)
    if dsso.train.objective != "loss":
        check_objective(
            dsso.train.objective, kind, [name for name in optim.available() if optim.is_forward(name)]
        )
    forward = optim.is_forward(kind)
    numbers = precision(raw, dsso, stage, gradients=not forward)
    notes: tuple[str, ...] = ()
    check_monitors(raw, kind, forward)
    if forward:
        notes = check_for_forward(raw, kind, stage)
    elif is_method:
        check_for_method(raw, kind, stage)
        check_products(model, kind, numbers, stage, dsso.engine)
    elif raw.get("gradient_clipping") == "auto":
        raise RecipeError(
            f"'auto' cannot be filled in for {kind}",
            where="gradient_clipping",
            got="auto",
            allowed="a number >= 0; 0 does not clip",
            remedy="write the largest gradient norm",
        )
    if "scheduler" in raw:
        _scheduler(raw)
    notes += notes_for_engine(raw, dsso.engine)
    return Recipe(raw, kind, model, is_method, dsso, numbers, stage, notes)


def _sections(raw: Mapping[str, Any]) -> tuple[DssoConfig, tuple[str, StrictModel, bool]]:
    """The `"dsso"` section and the optimizer; what is wrong with either is told together."""
    problems: list[RecipeError] = []
    dsso = optimizer = None
    try:
        dsso = parse(DssoConfig, raw.get("dsso", {}), "dsso")
    except RecipeError as error:
        problems.append(error)
    try:
        optimizer = _optimizer(raw)
    except RecipeError as error:
        problems.append(error)
    if dsso is None or optimizer is None:
        raise problems[0] if len(problems) == 1 else RecipeError("\n".join(map(str, problems))) from None
    return dsso, optimizer


def _optimizer(raw: Mapping[str, Any]) -> tuple[str, StrictModel, bool]:
    names = [*optim.available(), *BASELINES]
    if "optimizer" not in raw:
        remedy = f'add "optimizer": {{"type": "{names[0]}", "params": {{}}}}'
        raise RecipeError("is required and missing", where="optimizer", allowed=names, remedy=remedy)
    kind, params = raw["optimizer"].get("type"), raw["optimizer"].get("params", {})
    canonical = {name.lower(): name for name in names}.get(str(kind).lower())
    if canonical is None:
        close = nearest(str(kind), names)
        remedy = f"write {close!r}" if close else "write one of the allowed names"
        raise RecipeError("unknown optimizer", where="optimizer.type", got=kind, allowed=names, remedy=remedy)
    is_method = canonical not in BASELINES
    model = optim.resolve(canonical).Config if is_method else BASELINES[canonical]
    return canonical, parse(model, params, "optimizer.params"), is_method


def _scheduler(raw: Mapping[str, Any]) -> tuple[str, StrictModel]:
    kind, params = str(raw["scheduler"].get("type")), raw["scheduler"].get("params", {})
    if kind not in SCHEDULERS:
        close = nearest(kind, SCHEDULERS)
        remedy = f"write {close!r}" if close else "write one of the allowed names, or remove the section"
        raise RecipeError(
            "unknown scheduler", where="scheduler.type", got=kind, allowed=list(SCHEDULERS), remedy=remedy
        )
    model = parse(SCHEDULERS[kind], params, "scheduler.params")
    _check_warmup(without_none(model))
    return kind, model


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, strictly: no key twice, no NaN.

    Raises:
        RecipeError: it is missing, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        options = sorted(file.name for file in folder.glob("*.json")) if folder.is_dir() else []
        close = nearest(path.name, options)
        remedy = f"did you mean {folder / close}?" if close else "give the path of a JSON file"
        raise RecipeError("there is no such file", where=str(path), remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read ({error})", where=str(path), remedy="give a JSON file") from None
    return _load(text, str(path))


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _load(json.dumps(dict(source)), "recipe")
    except (TypeError, ValueError) as error:
        if isinstance(error, DssoError):
            raise
        raise RecipeError(f"cannot be written as JSON ({error})", where="recipe") from None


def _load(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RecipeError("a key is given twice", where=where, got=key, remedy="remove one of them")
            found[key] = value
        return found

    def constant(name: str) -> float:
        raise RecipeError("is no number in JSON", where=where, got=name, remedy="write a finite number")

    try:
        raw = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"is not JSON: {error.msg}",
            where=f"{where}:{error.lineno}:{error.colno}",
            got=text.splitlines()[error.lineno - 1].strip()[:60] if text.strip() else "an empty file",
            remedy="correct it at this line and column; JSON has no comments and no comma before a bracket",
        ) from None
    if not isinstance(raw, dict):
        raise RecipeError("must hold one JSON object", where=where, got=raw, remedy='write {"key": value, …}')
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one `path.to.key=value` in place."""
    path, sign, text = override.partition("=")
    *parents, last = path.strip().split(".")
    if not sign or not all([*parents, last]):
        allowed, remedy = "path.to.key=value", "write it as --set dsso.train.max_steps=50"
        raise RecipeError("is no override", where="--set", got=override, allowed=allowed, remedy=remedy)
    home = raw
    for depth, part in enumerate(parents):
        inner = home.setdefault(part, {})
        if not isinstance(inner, dict):
            here = ".".join(parents[: depth + 1])
            raise RecipeError(f"{here} is no object, so {path} cannot be set", where="--set", got=override)
        home = inner
    try:
        home[last] = json.loads(text)
    except json.JSONDecodeError:
        home[last] = text


def _drop_null(raw: dict[str, Any], path: str) -> None:
    """Remove a key that an override has set to null, unless null is one of its values, or the key is unknown."""
    if lookup(raw, path, ...) is None and not _null_is_told(raw, path):
        *parents, last = path.split(".")
        home = raw
        for part in parents:
            home = home[part]
        del home[last]


def _null_is_told(raw: Mapping[str, Any], path: str) -> bool:
    """Whether a null at this place is for the checks: a value of the field, or beside a name that nobody knows."""
    names = {name.lower(): name for name in [*optim.available(), *BASELINES]}
    kind = names.get(str(section(raw, "optimizer").get("type")).lower())
    methods = optim.available()
    params = None if kind is None else optim.resolve(kind).Config if kind in methods else BASELINES[kind]
    for prefix, model in (
        ("dsso", DssoConfig),
        ("optimizer.params", params),
        ("scheduler.params", SCHEDULERS.get(str(section(raw, "scheduler").get("type")))),
    ):
        if path.startswith(f"{prefix}."):
            return model is not None and _takes_null(model, path.removeprefix(f"{prefix}.").split("."))
    home, _, key = path.rpartition(".")
    return key not in (SECTIONS.get(home, ()) if home else {*TOP_LEVEL, "dsso"})


def _takes_null(model: type[StrictModel], parts: list[str]) -> bool:
    field = model.model_fields.get(parts[0])
    if field is None:
        return True
    inner = field.annotation
    if len(parts) > 1 and isinstance(inner, type) and issubclass(inner, StrictModel):
        return _takes_null(inner, parts[1:])
    return len(parts) > 1 or type(None) in get_args(inner)
