"""The recipe described for people and for editors: Markdown tables of all fields, and a JSON Schema.

Both are made from the pydantic models, so they cannot say anything else than what is checked.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import to_jsonable_python

from dsso import optim
from dsso.config import DssoConfig, StrictModel
from dsso.ds_keys import FIXED, FIXED_FOR_METHODS, SECTIONS, TOP_LEVEL, Kind
from dsso.recipe_models import BASELINES, SCHEDULERS
from dsso.schedule import Interval, ScheduleSpec
from dsso.sweep.format import SweepFile

_HEAD = ("| field | value | default | meaning |", "|---|---|---|---|")
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def reference() -> str:
    """All fields of a recipe as Markdown: one heading and one table per section."""
    parts = []
    for path, model in _sections():
        summary = (model.__doc__ or "").strip().splitlines()[0]
        fields = model.model_fields.items()
        # A section that may be left out has a row of its own besides its table.
        rows = [_row(name, field) for name, field in fields if not _inner(field) or field.default is None]
        if rows:
            parts.append("\n".join([f"### `{path}`", "", summary, "", *_HEAD, *rows]))
    return "\n\n".join(parts) + "\n"


def sweep_reference() -> str:
    """All fields of a sweep file as Markdown."""
    parts = []
    for path, model in _nested("sweep", SweepFile):
        rows = [_row(name, field) for name, field in model.model_fields.items()]
        place = path.removeprefix("sweep").removeprefix(".")
        title = f"`{place}`" if place else "The file"
        parts.append(
            "\n".join([f"### {title}", "", " ".join((model.__doc__ or "").split()), "", *_HEAD, *rows])
        )
    return "\n\n".join(parts) + "\n"


def refused() -> str:
    """Settings that dsso cannot work with, as a Markdown table."""
    rows = [
        f"| `{path}` | `{json.dumps(works)}` | {who} | {why} |"
        for who, table in (("all", FIXED), ("methods", FIXED_FOR_METHODS))
        for path, (works, why) in table.items()
    ]
    return "\n".join(["| setting | must be | for | because |", "|---|---|---|---|", *rows]) + "\n"


def fill(page: str) -> str:
    """The page with its tables brought up to date.

    Args:
        page: Markdown with `<!-- name: begin -->` and `<!-- name: end -->` around each generated part.
    """
    for name, generated in _GENERATED.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page:
            continue
        text = generated()
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n\n{text}\n{end}{after}"
    return page


_GENERATED = {"fields": reference, "refused": refused, "sweep": sweep_reference}
"""Generated parts of pages by name."""


def _sections() -> Iterator[tuple[str, type[StrictModel]]]:
    """Every model of a recipe with its place, outer ones first."""
    yield from _nested("dsso", DssoConfig)
    for name in optim.available():
        yield from _nested(f"optimizer.params of {name}", optim.resolve(name).Config)
    for name, baseline in BASELINES.items():
        yield f"optimizer.params of {name}", baseline
    for name, scheduler in SCHEDULERS.items():
        yield f"scheduler.params of {name}", scheduler


def _nested(path: str, model: type[StrictModel]) -> Iterator[tuple[str, type[StrictModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        inner = _inner(field)
        if inner is not None:
            first, _, rest = path.partition(" ")
            yield from _nested(f"{first}.{name} {rest}".rstrip(), inner)


def _inner(field: FieldInfo) -> type[StrictModel] | None:
    parts = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in parts if isinstance(kind, type) and issubclass(kind, StrictModel)), None)


def _row(name: str, field: FieldInfo) -> str:
    limits = ", ".join(_limits(field.metadata))
    value = _type(field.annotation) + (f", {limits}" if limits else "")
    default = (
        "required" if field.is_required() else f"`{_json(field.get_default(call_default_factory=True))}`"
    )
    meaning = " ".join((field.description or "").split())
    return (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", value, default, meaning)) + " |"
    )


def _json(value: object) -> str:
    text: str = json.dumps(to_jsonable_python(_plain(value)))
    return text


def _plain(value: object) -> object:
    """Intervals and schedules as a recipe writes them, anything else as it is."""
    return value.to_json() if isinstance(value, Interval | ScheduleSpec) else value


def _limits(metadata: list[Any]) -> list[str]:
    limits = []
    for entry in metadata:
        if isinstance(entry, annotated_types.MinLen):
            limits.append(f"at least {entry.min_length} long")
        for name, sign in _BOUNDS.items():
            if (bound := getattr(entry, name, None)) is not None:
                limits.append(f"{sign} {bound if isinstance(bound, int) else format(bound, 'g')}")
    return limits


def _type(kind: Any) -> str:
    """A type annotation in the words of JSON."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = ", ".join(_limits(list(args[1:])))
        return _type(args[0]) + (f" {limits}" if limits else "")
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in args)
    if origin in {Union, types.UnionType}:
        return " or ".join(dict.fromkeys(_type(part) for part in args))
    if origin in {list, tuple}:
        several = f"{len(args)} x " if origin is tuple else ""
        return f"list of {several}{_type(args[0])}"
    if origin is dict:
        return f"object of {_type(args[1])}"
    words = {
        Any: "any value",
        int: "integer",
        float: "number",
        bool: "boolean",
        str: "string",
        type(None): "null",
    }
    section = isinstance(kind, type) and issubclass(kind, StrictModel)
    other = "object (see below)" if section else str(kind)
    return {**words, ScheduleSpec: "schedule", Interval: "interval"}.get(kind, other)


class _Schema(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        """Intervals and schedules as a recipe writes them."""
        return super().encode_default(_plain(dft))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors that complete and check while one types."""
    methods = {name: optim.resolve(name).Config for name in optim.available()}
    optimizers: dict[str, type[pydantic.BaseModel]] = {**methods, **BASELINES}
    models: list[type[pydantic.BaseModel]] = [DssoConfig, *optimizers.values(), *SCHEDULERS.values()]
    refs, definitions = models_json_schema(
        [(model, "validation") for model in models], schema_generator=_Schema
    )
    ref = {model: refs[model, "validation"] for model in models}
    properties = {name: _loose(kind, name) for name, kind in TOP_LEVEL.items()}
    properties["optimizer"] = _choice({name: ref[model] for name, model in optimizers.items()})
    properties["scheduler"] = _choice({name: ref[model] for name, model in SCHEDULERS.items()})
    properties["dsso"] = ref[DssoConfig]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dsso recipe",
        "type": "object",
        "properties": properties,
        "required": ["optimizer"],
        "additionalProperties": False,
        "$defs": definitions["$defs"],
    }


def _loose(kind: Kind, path: str) -> dict[str, Any]:
    if kind == "any":
        return {}
    if kind != "object":
        return {"anyOf": [{"type": kind}, {"const": "auto"}]}
    if path not in SECTIONS:
        return {"type": "object"}
    inner = {
        key: _loose("object", f"{path}.{key}") if f"{path}.{key}" in SECTIONS else {}
        for key in SECTIONS[path]
    }
    return {"type": "object", "properties": dict(sorted(inner.items())), "additionalProperties": False}


def _choice(params: dict[str, Any]) -> dict[str, Any]:
    """An object `{"type": name, "params": its own}`."""
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"type": {"const": name}, "params": schema},
                "required": ["type"],
                "additionalProperties": False,
            }
            for name, schema in params.items()
        ]
    }
