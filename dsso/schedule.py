"""Values and intervals as pure functions of the step: `step -> value` and `step -> due or not`.

Nothing here has a state, so a resumed run needs nothing restored and every rank agrees without a message.
In a recipe:

    "damping": 0.1
    "damping": {"type": "piecewise", "points": [[0, 0.1], [100, 0.01]]}
    "damping": {"type": "cosine", "start": 0.1, "end": 0.01, "steps": 400, "delay": 20}
    "inverse_interval": 10
    "inverse_interval": [[0, 1], [20, 10], [200, 500], [2500, null]]

As types of pydantic fields: `ScalarSchedule` with `bounded(...)`, and `Interval`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dsso.errors import nearest

_RAMPS = ("linear", "cosine", "exponential")
_RAMP_KEYS = ("type", "start", "end", "steps", "delay")
_STEP_KEYS = ("type", "points")


@dataclass(frozen=True)
class ScheduleSpec:
    """A value that changes with the step.

    `piecewise` is a step function: each point `(step, value)` holds from that step on. The ramps `linear`,
    `cosine` (half a wave) and `exponential` (constant ratio) hold `start` for `delay` steps, go to `end`
    within `steps` steps and stay there.
    """

    type: Literal["piecewise", "linear", "cosine", "exponential"]
    points: tuple[tuple[int, float], ...] = ()
    """piecewise: `(step, value)`, the first step is 0."""
    start: float = 0.0
    """Ramps: value up to step `delay`."""
    end: float = 0.0
    """Ramps: value from step `delay + steps` on."""
    steps: int = 1
    """Ramps: length in optimizer steps."""
    delay: int = 0
    """Ramps: optimizer steps before the ramp."""

    def to_json(self) -> dict[str, Any]:
        """The form that a recipe holds."""
        if self.type == "piecewise":
            return {"type": self.type, "points": [list(point) for point in self.points]}
        return {name: getattr(self, name) for name in _RAMP_KEYS}


Scalar: TypeAlias = float | ScheduleSpec


def value(spec: Scalar, step: int) -> float:
    """The value at an optimizer step, counted from 0."""
    if not isinstance(spec, ScheduleSpec):
        return float(spec)
    if spec.type == "piecewise":
        reached = bisect.bisect_right([at for at, _ in spec.points], step)
        return spec.points[max(reached, 1) - 1][1]
    done = min(max((step - spec.delay) / spec.steps, 0.0), 1.0)
    # the ends are returned as they were written, not as rounding leaves them
    if done in {0.0, 1.0}:
        return spec.end if done else spec.start
    if spec.type == "exponential":
        return spec.start * math.pow(spec.end / spec.start, done)
    share = done if spec.type == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
    return spec.start + (spec.end - spec.start) * share


def values(spec: Scalar) -> list[float]:
    """The values between which all others lie: every point of a step function, both ends of a ramp."""
    if not isinstance(spec, ScheduleSpec):
        return [float(spec)]
    return [level for _, level in spec.points] if spec.type == "piecewise" else [spec.start, spec.end]


def minimum(spec: Scalar) -> float:
    """The smallest value that the schedule ever takes."""
    return min(values(spec))


def maximum(spec: Scalar) -> float:
    """The largest value that the schedule ever takes."""
    return max(values(spec))


def _wrong(
    what: str, *, got: object = None, allowed: object = None, remedy: str | None = None
) -> PydanticCustomError:
    """An error with the parts that `dsso.config.parse` turns into a `RecipeError`."""
    parts = {"what": what, "got": got, "allowed": allowed, "remedy": remedy}
    return PydanticCustomError("dsso", "{what}", {k: v for k, v in parts.items() if v is not None})


def _number(data: object, name: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
        raise _wrong(f"{name} must be a finite number", got=data)
    return float(data)


def _count(data: object, name: str, least: int) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or data < least:
        raise _wrong(f"{name} must be an integer of at least {least}", got=data)
    return data


def _pairs(data: object, what: str, form: str) -> list[tuple[Any, Any]]:
    """`[[a, b], …]`, whose `a` are steps that start at 0 and grow."""
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise _wrong(f"{what}s must be a list that is not empty", got=data, allowed=form)
    pairs: list[tuple[Any, Any]] = []
    for index, entry in enumerate(data):
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise _wrong(f"{what} {index} is not a pair", got=entry, allowed=form)
        at = _count(entry[0], f"the step of {what} {index}", 0)
        if index == 0 and at != 0:
            raise _wrong(
                f"{what} 0 starts at step {at}", got=entry, remedy=f"let the first {what} start at step 0"
            )
        if pairs and at <= pairs[-1][0]:
            said = f"{what} {index} starts at step {at}, not after {what} {index - 1} (step {pairs[-1][0]})"
            raise _wrong(
                said, got=entry, remedy=f"write the {what}s in the order of their steps, each step once"
            )
        pairs.append((at, entry[1]))
    return pairs


def parse_scalar(data: object) -> Scalar:
    """A number or a `ScheduleSpec` from its JSON form.

    Raises:
        PydanticCustomError: what is wrong; inside a pydantic model it becomes a `ValidationError`.
    """
    if isinstance(data, ScheduleSpec):
        data = data.to_json()
    if not isinstance(data, Mapping):
        if isinstance(data, bool) or not isinstance(data, int | float):
            forms = 'a number, or {"type": "piecewise" | "linear" | "cosine" | "exponential", ...}'
            raise _wrong("is neither a number nor a schedule", got=data, allowed=forms)
        return _number(data, "the value")
    kind = data.get("type")
    if kind not in ("piecewise", *_RAMPS):
        raise _wrong("the schedule has no known type", got=kind, allowed=["piecewise", *_RAMPS])
    keys = _STEP_KEYS if kind == "piecewise" else _RAMP_KEYS
    for key in data:
        if key not in keys:
            close = nearest(str(key), keys)
            hint = f"; nearest: {close!r}" if close else ""
            raise _wrong(f"unknown key {key!r} in a {kind} schedule{hint}", got=key, allowed=list(keys))
    for key in keys:
        if key not in data and key != "delay":
            raise _wrong(f"the {kind} schedule lacks {key!r}", allowed=list(keys), remedy=f"add {key!r}")
    if kind == "piecewise":
        pairs = _pairs(data["points"], "point", "[[step, value], ...]")
        levels = [
            (at, _number(level, f"the value of point {index}")) for index, (at, level) in enumerate(pairs)
        ]
        return ScheduleSpec("piecewise", points=tuple(levels))
    start, end = _number(data["start"], "start"), _number(data["end"], "end")
    if kind == "exponential" and (start <= 0.0 or end <= 0.0):
        said = "an exponential schedule needs start and end above 0"
        raise _wrong(said, got=[start, end], remedy="use type 'linear' or 'cosine' to reach 0")
    steps, delay = _count(data["steps"], "steps", 1), _count(data.get("delay", 0), "delay", 0)
    return ScheduleSpec(kind, start=start, end=end, steps=steps, delay=delay)


@dataclass(frozen=True)
class Bounds:
    """Bounds that every value of a schedule must keep, see `bounded`."""

    gt: float | None = None
    """Every value is greater."""
    ge: float | None = None
    """Every value is greater or equal."""
    lt: float | None = None
    """Every value is less."""
    le: float | None = None
    """Every value is less or equal."""

    def _breaks(self, level: float) -> bool:
        return (
            (self.gt is not None and level <= self.gt)
            or (self.ge is not None and level < self.ge)
            or (self.lt is not None and level >= self.lt)
            or (self.le is not None and level > self.le)
        )

    def check(self, spec: Scalar) -> Scalar:
        """The schedule itself.

        Raises:
            PydanticCustomError: with the first value that is out of bounds.
        """
        for level in filter(self._breaks, values(spec)):
            signs = [(">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le)]
            allowed = " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)
            said = "takes a value out of range" if isinstance(spec, ScheduleSpec) else "is out of range"
            raise _wrong(said, got=level, allowed=allowed)
        return spec

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after the schedule was read."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))


bounded = Bounds
"""Short form for the type of a field: `Annotated[ScalarSchedule, bounded(gt=0.0)]`."""


def _written(spec: Scalar) -> float | dict[str, Any]:
    return spec.to_json() if isinstance(spec, ScheduleSpec) else spec


_NUMBER = {"type": "number"}
_STEP = {"type": "integer", "minimum": 0}
_POINT = {"type": "array", "prefixItems": [_STEP, _NUMBER], "minItems": 2, "maxItems": 2}
_SCALAR_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _NUMBER,
        {
            "type": "object",
            "properties": {
                "type": {"const": "piecewise"},
                "points": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "prefixItems": [_STEP, _NUMBER]},
                },
            },
            "required": list(_STEP_KEYS),
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"enum": list(_RAMPS)},
                "start": _NUMBER,
                "end": _NUMBER,
                "steps": {"type": "integer", "minimum": 1},
                "delay": _STEP,
            },
            "required": ["type", "start", "end", "steps"],
            "additionalProperties": False,
        },
    ]
}

ScalarSchedule: TypeAlias = Annotated[
    float | ScheduleSpec,
    PlainValidator(parse_scalar),
    PlainSerializer(_written),
    WithJsonSchema(_SCALAR_SCHEMA),
]
"""Type of a pydantic field that holds a number or a schedule; read it with `value(field, step)`."""


@dataclass(frozen=True)
class Interval:
    """On which steps something is done: segments `(start, every)`.

    From step `start` on it is due every `every` steps, at `start` itself first, until the next segment takes
    over; `every = None` means never again: `Interval(((0, 1), (20, None)))` is due on the first twenty steps.
    """

    segments: tuple[tuple[int, int | None], ...]

    @classmethod
    def every(cls, steps: int) -> Interval:
        """Due on step 0 and every `steps` steps from there."""
        return cls.parse(steps)

    @classmethod
    def parse(cls, data: object) -> Interval:
        """An interval from its JSON form: `k` or `[[start, every or null], …]`.

        Raises:
            PydanticCustomError: with the segment; inside a pydantic model it becomes a `ValidationError`.
        """
        if isinstance(data, Interval):
            data = data.segments
        if not isinstance(data, Sequence) or isinstance(data, str):
            return cls(((0, _count(data, "the interval", 1)),))
        pairs = _pairs(data, "segment", "[[start, every or null], ...]")
        for index, (_, every) in enumerate(pairs):
            if every is not None:
                _count(every, f"the interval of segment {index}", 1)
            elif index == 0:
                raise _wrong(
                    "segment 0 is never due",
                    got=list(pairs[0]),
                    remedy="give segment 0 an interval of at least 1",
                )
        return cls(tuple(pairs))

    @property
    def often(self) -> float:
        """Times a step in the last segment, 0 to 1."""
        every = self.segments[-1][1]
        return 1.0 / every if every else 0.0

    def current(self, step: int) -> int | None:
        """Steps between two due steps at `step`; None when it is never due again in this segment."""
        return self.segment(step)[1]

    def due(self, step: int) -> bool:
        """True when it is done on `step`, counted from 0."""
        start, every = self.segment(step)
        return every is not None and (step - start) % every == 0

    def segment(self, step: int) -> tuple[int, int | None]:
        """`(start, every)` of the segment that `step` is in."""
        reached = bisect.bisect_right([start for start, _ in self.segments], step)
        return self.segments[max(reached, 1) - 1]

    def to_json(self) -> int | list[list[int | None]]:
        """The form that a recipe holds."""
        if len(self.segments) == 1 and self.segments[0][1] is not None:
            return self.segments[0][1]
        return [list(segment) for segment in self.segments]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate with `parse`, write with `to_json`."""
        write = core_schema.plain_serializer_function_ser_schema(cls.to_json)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=write)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Both JSON forms."""
        positive = {"type": "integer", "minimum": 1}
        pair = {**_POINT, "prefixItems": [_STEP, {"anyOf": [positive, {"type": "null"}]}]}
        return {"anyOf": [positive, {"type": "array", "minItems": 1, "items": pair}]}
