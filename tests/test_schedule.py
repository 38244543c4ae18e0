"""Schedules and intervals: values at the corners, bounds, JSON forms, messages."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any

import pytest

from dsso.config import StrictModel, parse
from dsso.errors import RecipeError
from dsso.schedule import (
    Interval,
    ScalarSchedule,
    ScheduleSpec,
    bounded,
    maximum,
    minimum,
    parse_scalar,
    value,
)


class Model(StrictModel):
    """Fields as a method declares them."""

    damping: Annotated[ScalarSchedule, bounded(ge=0.0)] = 0.1
    tau: Annotated[ScalarSchedule, bounded(gt=0.0)] = 1.0
    share: Annotated[ScalarSchedule, bounded(lt=1.0, le=2.0)] = 0.5
    every: Interval = Interval.every(10)


def read(**fields: Any) -> Model:
    return parse(Model, fields, "optimizer.params")


def message(**fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(**fields)
    return str(caught.value)


def test_a_number_is_the_same_at_every_step() -> None:
    assert [value(read(tau=2).tau, step) for step in (0, 1, 10**6)] == [2.0, 2.0, 2.0]


def test_piecewise_holds_from_each_point_on() -> None:
    spec = parse_scalar({"type": "piecewise", "points": [[0, 0.1], [100, 0.01], [101, 5]]})
    assert [value(spec, step) for step in (0, 99, 100, 101, 10**9)] == [0.1, 0.1, 0.01, 5.0, 5.0]
    assert (minimum(spec), maximum(spec)) == (0.01, 5.0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_ramps_meet_both_ends_exactly_and_stay_there(kind: str) -> None:
    spec = parse_scalar({"type": kind, "start": 0.1, "end": 0.003, "steps": 40, "delay": 7})
    assert [value(spec, step) for step in (0, 7)] == [0.1, 0.1]
    assert [value(spec, step) for step in (47, 48, 10**9)] == [0.003, 0.003, 0.003]
    inner = [value(spec, step) for step in range(7, 48)]
    assert all(left > right for left, right in itertools.pairwise(inner))
    assert (minimum(spec), maximum(spec)) == (0.003, 0.1)


def test_ramps_half_way() -> None:
    def half(kind: str, start: float, end: float) -> float:
        return value(ScheduleSpec(kind, start=start, end=end, steps=10), 5)  # type: ignore[arg-type]

    assert half("linear", 1.0, 0.0) == pytest.approx(0.5)
    assert half("cosine", 1.0, 0.0) == pytest.approx(0.5)
    assert half("exponential", 1.0, 0.01) == pytest.approx(0.1)
    quarter = value(ScheduleSpec("cosine", start=0.0, end=1.0, steps=4), 1)
    assert quarter == pytest.approx(0.5 * (1.0 - math.cos(math.pi / 4.0)))


@pytest.mark.parametrize(
    "written",
    [
        {"tau": 2.0},
        {"damping": {"type": "piecewise", "points": [[0, 0.1], [5, 0.0]]}},
        {"damping": {"type": "cosine", "start": 1.0, "end": 0.5, "steps": 3, "delay": 2}},
        {"every": 3},
        {"every": [[0, 1], [20, 10], [200, 500], [2500, None]]},
    ],
)
def test_what_is_read_is_written_back(written: dict[str, Any]) -> None:
    model = read(**written)
    dumped = model.model_dump(mode="json")
    assert {name: dumped[name] for name in written} == written
    assert read(**dumped) == model


def test_segments_say_when_it_is_due() -> None:
    early = read(every=[[0, 1], [4, 3], [12, None]]).every
    assert [step for step in range(60) if early.due(step)] == [0, 1, 2, 3, 4, 7, 10]
    assert [early.current(step) for step in (0, 3, 4, 11, 12, 1000)] == [1, 1, 3, 3, None, None]
    assert [step for step in range(10) if Interval.every(4).due(step)] == [0, 4, 8]


def test_a_segment_restarts_the_count_and_may_begin_again() -> None:
    again = read(every=[[0, 5], [7, None], [20, 4]]).every
    assert [step for step in range(30) if again.due(step)] == [0, 5, 20, 24, 28]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"tau": 0}, ["optimizer.params.tau: is out of range", "got: 0.0", "allowed: > 0"]),
        ({"tau": -1.5}, ["got: -1.5", "allowed: > 0"]),
        ({"damping": -1e-3}, ["optimizer.params.damping", "got: -0.001", "allowed: >= 0"]),
        (
            {"tau": {"type": "linear", "start": 1, "end": 0, "steps": 3}},
            ["takes a value out of range", "got: 0.0"],
        ),
        ({"share": 1.5}, ["allowed: < 1 and <= 2"]),
        ({"tau": "1"}, ["neither a number nor a schedule", "got: '1'", "piecewise"]),
        ({"tau": True}, ["neither a number nor a schedule", "got: True"]),
        ({"tau": None}, ["neither a number nor a schedule"]),
        ({"tau": {"type": "lin"}}, ["no known type", "got: 'lin'", "nearest: 'linear'"]),
        ({"tau": {"start": 1}}, ["no known type", "allowed: piecewise, linear, cosine, exponential"]),
        (
            {"tau": {"type": "linear", "start": 1, "ende": 2, "steps": 3}},
            ["unknown key 'ende'", "nearest: 'end'", "allowed: type, start, end, steps, delay"],
        ),
        ({"tau": {"type": "linear", "start": 1, "steps": 3}}, ["lacks 'end'", "remedy: add 'end'"]),
        (
            {"tau": {"type": "linear", "start": 1, "end": 2, "steps": 0}},
            ["steps must be an integer of at least 1"],
        ),
        (
            {"tau": {"type": "linear", "start": 1, "end": 2, "steps": 3, "delay": -1}},
            ["delay must be an integer of at least 0", "got: -1"],
        ),
        (
            {"tau": {"type": "linear", "start": "a", "end": 2, "steps": 3}},
            ["start must be a finite number", "'a'"],
        ),
        (
            {"damping": {"type": "exponential", "start": 1, "end": 0, "steps": 3}},
            ["start and end above 0", "got: [1.0, 0.0]", "remedy: use type 'linear' or 'cosine'"],
        ),
        ({"tau": {"type": "piecewise", "points": []}}, ["points must be a list that is not empty"]),
        ({"tau": {"type": "piecewise", "points": [[0, 1], [3]]}}, ["point 1 is not a pair", "got: [3]"]),
        (
            {"tau": {"type": "piecewise", "points": [[0, "x"]]}},
            ["the value of point 0 must be a finite number"],
        ),
        (
            {"tau": {"type": "piecewise", "points": [[5, 1.0]]}},
            ["point 0 starts at step 5", "start at step 0"],
        ),
        (
            {"tau": {"type": "piecewise", "points": [[0, 1], [0, 2]]}},
            ["point 1 starts at step 0, not after point 0", "remedy: write the points in the order"],
        ),
        ({"every": 0}, ["optimizer.params.every: the interval must be an integer of at least 1", "got: 0"]),
        ({"every": 2.5}, ["must be an integer", "got: 2.5"]),
        ({"every": "3"}, ["must be an integer", "got: '3'"]),
        ({"every": []}, ["segments must be a list that is not empty"]),
        ({"every": [[0, 1], [5, 0]]}, ["the interval of segment 1 must be an integer of at least 1"]),
        ({"every": [[1, 1]]}, ["segment 0 starts at step 1"]),
        ({"every": [[0, 1], [9, 2], [9, 3]]}, ["segment 2 starts at step 9, not after segment 1 (step 9)"]),
        ({"every": [[0, None]]}, ["segment 0 is never due", "remedy: give segment 0 an interval"]),
        ({"every": [[0, 1], 5]}, ["segment 1 is not a pair", "[[start, every or null], ...]"]),
    ],
)
def test_a_wrong_value_is_told_with_its_place(fields: dict[str, Any], parts: list[str]) -> None:
    told = message(**fields)
    for part in parts:
        assert part in told, told
