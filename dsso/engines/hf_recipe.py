"""What a Hugging Face Trainer is told of an optimizer: read and checked before training starts.

With DeepSpeed it is the configuration that `TrainingArguments(deepspeed=…)` names, otherwise a recipe of its own that
holds the optimizer alone. `"auto"` is filled in by the Trainer, where it does so for its own optimizers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsso.config import DssoConfig, StrictModel, parse
from dsso.errors import RecipeError, nearest
from dsso.optim import available, is_forward, resolve
from dsso.recipe_checks import (
    SUB_GROUP_SIZE,
    check_auto,
    check_fixed,
    check_for_method,
    check_keys,
    lookup,
    precision,
    section,
    zero_stage,
)
from dsso.recipe_models import BASELINES, SCHEDULERS
from dsso.recipe_products import check_products

Source = str | Path | Mapping[str, Any]
"""Path of a JSON file, or the object itself."""

_SHARED = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Parameters of every method on gradients that TrainingArguments have under a name of their own."""


@dataclass(frozen=True)
class Asked:
    """An optimizer as a Trainer was told.

    Attributes:
        kind: `optimizer.type`, in capitals.
        config: its validated parameters.
        notes: what the user should know.
    """

    kind: str
    config: StrictModel
    notes: tuple[str, ...] = ()


def read(source: Source) -> dict[str, Any]:
    """A JSON object, from a file or as it is given.

    Args:
        source: what the user gave.

    Raises:
        RecipeError: there is no such file, or it holds something else.
    """
    if not isinstance(source, str | Path):
        return copy.deepcopy(dict(source))
    path = Path(source)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        options = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        close = nearest(path.name, options)
        remedy = f"did you mean {path.parent / close}?" if close else "give the path of a JSON file"
        raise RecipeError("there is no such file", where=str(path), remedy=remedy) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"is not JSON ({error})", where=str(path), remedy="give a JSON file") from None
    if not isinstance(found, dict):
        raise RecipeError("must hold one JSON object", where=str(path), got=found)
    return found


def from_deepspeed(args: Any, written: Source | None, filled: dict[str, Any]) -> Asked:
    """The optimizer of a DeepSpeed configuration; what dsso does itself is taken out of it.

    Args:
        args: TrainingArguments.
        written: the configuration as the user gave it; None: only the filled one is known.
        filled: the same with the Trainer's values in the place of `"auto"`, which DeepSpeed will get; changed here.

    Raises:
        RecipeError: for whatever would go wrong later, or be ignored in silence.
    """
    raw = read(filled if written is None else written)
    check_keys(raw)
    if "optimizer" not in raw:
        raise RecipeError(
            "the DeepSpeed configuration names no optimizer",
            where="optimizer",
            allowed=_on_gradients(),
            remedy='add "optimizer": {"type": "KFAC", "params": {…}}',
        )
    now = {**copy.deepcopy(filled), "optimizer": copy.deepcopy(filled.get("optimizer", raw["optimizer"]))}
    kind, config, notes = _optimizer(now["optimizer"], args)
    check_auto({**now, "optimizer": {}})
    check_fixed(now)
    stage = zero_stage(now, "deepspeed")
    # What stands there now may be the Trainer's own default.
    clipping = raw.get("gradient_clipping", 0.0)
    check_for_method({**now, "gradient_clipping": clipping}, kind, stage)
    numbers = precision({k: v for k, v in now.items() if k != "dsso"}, DssoConfig(), stage)
    check_products(config, kind, numbers, stage, "deepspeed")
    _scheduler(now)
    if "dsso" in raw:
        notes = (
            *notes,
            'the section "dsso" is not used by the Trainer, which has its own model, data and loop',
        )
    notes = (*notes, *_clipping(args, kind, config))
    filled.pop("optimizer", None)
    filled["gradient_clipping"] = 0.0
    if stage == 3:
        filled.setdefault("zero_optimization", {})["sub_group_size"] = SUB_GROUP_SIZE
    return Asked(kind, config, notes)


def from_recipe(args: Any, source: Source | None) -> Asked:
    """The optimizer of a recipe for a Trainer without DeepSpeed.

    Args:
        args: TrainingArguments.
        source: `{"optimizer": {"type": …, "params": {…}}}`, or a file that holds it.

    Raises:
        RecipeError: it cannot be used.
    """
    kind, config, notes = _optimizer(_alone(source), args)
    if args.fp16:
        raise RecipeError(
            "fp16 needs DeepSpeed's loss scaling",
            where="TrainingArguments.fp16",
            got=True,
            remedy="use bf16 or fp32, or TrainingArguments(deepspeed=…) with ZeRO stage 1, 2 or 3",
        )
    return Asked(kind, config, (*notes, *_clipping(args, kind, config)))


def of_forward_method(source: Source | None, args: Any) -> Asked:
    """A method that needs only losses.

    Args:
        source: `{"optimizer": {"type": "MeZO", "params": {…}}}`, or a file that holds it.
        args: TrainingArguments.

    Raises:
        RecipeError: it is none, or cannot be used.
    """
    written = _alone(source)
    kind = _kind(written)
    if not is_forward(kind):
        raise RecipeError(
            f"{kind} needs gradients",
            where="optimizer.type",
            got=kind,
            allowed=[name for name in available() if is_forward(name)],
            remedy="use transformers' own Trainer and dsso.attach(trainer, recipe)",
        )
    config, notes = _parameters(kind, written, args)
    return Asked(kind, config, notes)


def _alone(source: Source | None) -> Mapping[str, Any]:
    """The `optimizer` section of a recipe that has no other."""
    example = '{"optimizer": {"type": "KFAC", "params": {"lr": "auto"}}}'
    if source is None:
        raise RecipeError(
            "without DeepSpeed the optimizer has to be given",
            where="dsso.attach",
            remedy=f"call dsso.attach(trainer, {example}), or give the path of a file that holds it",
        )
    raw = read(source)
    for key in raw:
        if key != "optimizer":
            raise RecipeError(
                "unknown key",
                where=key,
                got=key,
                allowed=["optimizer"],
                remedy="everything else is the Trainer's: remove the key, or, if it is DeepSpeed's,"
                " give the file as TrainingArguments(deepspeed=…)",
            )
    if not isinstance(raw.get("optimizer"), Mapping):
        raise RecipeError(
            "is required and missing", where="optimizer", got=raw.get("optimizer"), remedy=f"write {example}"
        )
    found: Mapping[str, Any] = raw["optimizer"]
    return found


def _on_gradients() -> list[str]:
    return [name for name in available() if not is_forward(name)]


def _kind(written: Mapping[str, Any]) -> str:
    """`optimizer.type` as it is known; a baseline is one that is known and not for here."""
    for key in written:
        if key not in ("type", "params"):
            raise RecipeError("unknown key", where=f"optimizer.{key}", got=key, allowed=["type", "params"])
    kind = str(written.get("type"))
    if kind.upper() in available():
        return kind.upper()
    if kind.lower() in {name.lower() for name in BASELINES}:
        raise RecipeError(
            "is an optimizer that the Trainer has without dsso",
            where="optimizer.type",
            got=kind,
            allowed=available(),
            remedy="leave the call of dsso out",
        )
    close = nearest(kind, available())
    remedy = f"write {close!r}" if close else "write one of the allowed names"
    raise RecipeError(
        "unknown optimizer", where="optimizer.type", got=kind, allowed=available(), remedy=remedy
    )


def _optimizer(written: Mapping[str, Any], args: Any) -> tuple[str, StrictModel, tuple[str, ...]]:
    """Type and parameters of a method on gradients."""
    kind = _kind(written)
    if is_forward(kind):
        raise RecipeError(
            f"{kind} takes steps from losses alone, and the Trainer's loop makes gradients",
            where="optimizer.type",
            got=kind,
            allowed=_on_gradients(),
            remedy="use dsso.ForwardTrainer in the place of transformers.Trainer",
        )
    config, notes = _parameters(kind, written, args)
    if getattr(config, "fisher", None) == "sampled":
        raise RecipeError(
            "the Trainer does not tell which terms its loss has, so labels cannot be drawn for them",
            where="optimizer.params.fisher",
            got="sampled",
            allowed="empirical, forward_only",
            remedy="set it to 'empirical', or train with launch/train.py",
        )
    estimation = config.estimation(1)  # type: ignore[attr-defined]
    if any(getattr(estimation, one.name) for one in fields(estimation)):
        raise RecipeError(
            f"{kind} with these parameters takes windows of estimation, which the Trainer's loop does not run",
            where="optimizer.type",
            got=kind,
            remedy="train with launch/train.py or dsso.initialize, or take a method (or a setting) without them:"
            " K-FAC, EKFAC, Shampoo, SOAP, PSGD without form = newton, and no adaptive_damping",
        )
    return kind, config, notes


def _parameters(kind: str, written: Mapping[str, Any], args: Any) -> tuple[StrictModel, tuple[str, ...]]:
    """Parameters with the Trainer's values where the recipe leaves them to it."""
    params = written.get("params", {})
    model: type[StrictModel] = resolve(kind).Config
    if not isinstance(params, Mapping):
        parse(model, params, "optimizer.params")
    filled, notes = dict(params), []
    for name, theirs in _SHARED.items():
        value, default = getattr(args, theirs), _default(args, theirs)
        if name not in model.model_fields:
            continue
        if filled.get(name) == "auto":
            filled[name] = value
        elif name not in filled and value != default:
            filled[name] = value
            notes.append(f"optimizer.params.{name} is TrainingArguments.{theirs}, {value}")
        elif name in filled and value not in (default, filled[name]):
            raise RecipeError(
                f"contradicts TrainingArguments.{theirs}, which is {value}",
                where=f"optimizer.params.{name}",
                got=filled[name],
                allowed=f"{value}, or auto",
                remedy="write 'auto'",
            )
    return parse(model, filled, "optimizer.params"), tuple(notes)


def _default(args: Any, name: str) -> Any:
    """What TrainingArguments have when the user says nothing."""
    return type(args).__dataclass_fields__[name].default


def _clipping(args: Any, kind: str, config: StrictModel) -> tuple[str, ...]:
    """Nothing is clipped twice: the method's own bound holds, the Trainer's is switched off."""
    asked = args.max_grad_norm
    if not asked:
        return ()
    mode, tau = getattr(config, "clip", "none"), getattr(config, "tau", None)
    if asked != _default(args, "max_grad_norm"):
        raise RecipeError(
            f"{kind} clips by itself (optimizer.params.clip is {mode!r}), and the Trainer's clipping would come on top",
            where="TrainingArguments.max_grad_norm",
            got=asked,
            allowed="0",
            remedy="set max_grad_norm=0.0; to bound the gradient, optimizer.params.clip = 'pre' and"
            f" optimizer.params.tau = {asked}",
        )
    args.max_grad_norm = 0.0
    bound = "" if mode == "none" else f", tau {tau}"
    told = f"{kind} clips by itself: optimizer.params.clip is {mode!r}{bound}"
    return (f"max_grad_norm ({asked}, the Trainer's default) is not used; {told}",)


def no_clipping(args: Any, kind: str) -> None:
    """Switch off a clipping that has nothing to clip.

    Args:
        args: TrainingArguments.
        kind: of a method from losses.

    Raises:
        RecipeError: the user has asked for it.
    """
    if args.max_grad_norm and args.max_grad_norm != _default(args, "max_grad_norm"):
        raise RecipeError(
            f"{kind} takes steps from losses alone: there are no gradients to clip",
            where="TrainingArguments.max_grad_norm",
            got=args.max_grad_norm,
            allowed="0",
            remedy="set max_grad_norm=0.0; optimizer.params.max_slope bounds the slopes",
        )
    args.max_grad_norm = 0.0


def refuse(args: Any, who: str, settings: Mapping[str, str]) -> None:
    """Refuse TrainingArguments that would break something, or be ignored in silence.

    Args:
        args: TrainingArguments.
        who: what they do not work with.
        settings: name of the argument -> why, and what to do instead, apart by a bar.

    Raises:
        RecipeError: for the first that is set.
    """
    for name, words in settings.items():
        value = getattr(args, name, None)
        if value and value != type(args).__dataclass_fields__[name].default:
            why, _, remedy = words.partition("|")
            raise RecipeError(
                f"does not work with {who}: {why}",
                where=f"TrainingArguments.{name}",
                got=value if isinstance(value, bool | int | float | str) else type(value).__name__,
                remedy=remedy or f"leave {name} out",
            )


def _scheduler(raw: Mapping[str, Any]) -> None:
    """A scheduler of DeepSpeed's, where the configuration has one."""
    if "scheduler" not in raw:
        return
    kind = str(lookup(raw, "scheduler.type"))
    if kind not in SCHEDULERS:
        close = nearest(kind, SCHEDULERS)
        remedy = f"write {close!r}" if close else "write one of the allowed names, or remove the section"
        raise RecipeError(
            "unknown scheduler", where="scheduler.type", got=kind, allowed=list(SCHEDULERS), remedy=remedy
        )
    parse(SCHEDULERS[kind], section(raw, "scheduler.params"), "scheduler.params")
