"""`--profile_steps`: traces with the names of our phases, a table, and nothing at all where no profiler is on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso.errors import RecipeError
from dsso.phases import PHASES, PREFIX, phase, phased
from launch.arguments import Steps, parse, parse_steps
from tests.launch.runs import lines, partitions, train, write_recipe

MEZO = {"optimizer": {"type": "MeZO", "params": {"lr": 1e-3, "eps": 1e-3}}}


def phases_in(path: Path) -> set[str]:
    """Names of our phases in a trace, whole steps included."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return {one["name"].removeprefix(PREFIX) for one in events if str(one.get("name")).startswith(PREFIX)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"capture", "factorize", "gather", "precondition", "clip", "write back", "base rule"}),
        (MEZO, {"evaluate", "noise", "move"}),
    ],
    ids=["KFAC", "MeZO"],
)
def test_a_run_with_a_profile(
    changes: dict[str, Any],
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = {"dsso.train.max_steps": 4, "dsso.train.eval_interval": 4, "dsso.model.dropout": 0.0, **changes}
    recipe = write_recipe(tmp_path, short)
    for out, more in (("plain", ()), ("out", ("--profile_steps", "3:3"))):
        assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / out, *more) == 0
    text = capsys.readouterr().out
    assert phases_in(tmp_path / "out" / "profile" / "rank0.json.gz") == expected | {"step 3"}
    assert text.count("profile of 1 step on this rank") == 1
    for name in (*expected, "whole step"):
        assert any(line.startswith(f"{name} ") for line in text.splitlines()), name
    assert not (tmp_path / "plain" / "profile").exists()
    assert lines(tmp_path / "out") == lines(tmp_path / "plain")
    mine, theirs = partitions(tmp_path / "out", 4), partitions(tmp_path / "plain", 4)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("text", ["0:3", "5:4", "x", "3", "2:b", ":", "1:2:3"])
def test_what_is_no_range_of_steps(text: str) -> None:
    with pytest.raises(RecipeError, match="two numbers of steps"):
        parse_steps(text)
    assert parse_steps("2:2") == Steps(2, 2)


def test_a_profile_of_steps_that_are_not_taken_or_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--profile_steps", "11:12") == 2
    assert "the run takes none of these steps" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(RecipeError, match="--check starts none"):
        parse(["--ds_config", str(recipe), "--check", "--profile_steps", "1:2"])


def test_phases_cost_nothing_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> None:
        raise AssertionError("recorded without a profiler")

    monkeypatch.setattr("dsso.phases.record_function", forbidden)
    assert phase("reduce") is phase("clip"), "one context for all"
    assert phased("reduce")(lambda x: x + 1)(1) == 2


def test_any_profiler_of_torch_sees_phases() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with phase("reduce"):
            torch.ones(2).sum()
        phased("clip")(lambda: torch.ones(2).sum())()
    names = {event.key for event in profiler.key_averages()}
    assert {f"{PREFIX}reduce", f"{PREFIX}clip"} <= names
    assert {"reduce", "clip"} <= set(PHASES)
