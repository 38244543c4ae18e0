"""Files that a run writes, and the watchers that keep it honest."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso import diagnostics
from dsso.diagnostics import FlatWatch, MetricsLog, NoopWatch, SkipGuard, jsonable, method_table
from dsso.errors import RunError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_become_json() -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, 1.5, True, None],
        3: Path("x"),
        "t": torch.tensor([1.0, math.nan]),
    }
    assert jsonable(value) == {"a": None, "b": [None, 1.5, True, None], "3": "x", "t": [1.0, None]}


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3, 4):
        log.write(step=step, loss=1.0 / step)
        if step % 2 == 0:
            log.write(step=step, eval={"split": "validation", "step": step, "metrics": {"f1": 0.5}})
    log.write(step=2, eval={"split": "test", "step": 2, "metrics": {"f1": 0.5}})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 2, "loss": 0.')  # killed while writing
    again = MetricsLog(path, step=2)
    assert [line["step"] for line in lines(path)] == [1, 2, 2]
    again.write(step=3, loss=math.nan)
    again.close()
    assert lines(path)[-1] == {"step": 3, "loss": None}
    MetricsLog(path, step=0).close()
    assert path.read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(None)
    log.write(step=1)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_lines_whole_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step=1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))  # room for five bytes only
    log.write(step=2)
    log.write(step=3)
    assert lines(path) == [{"step": 1}]
    assert capsys.readouterr().err.count("cannot be written now (only a part of a line fits)") == 1
    monkeypatch.setattr(os, "write", write)
    log.write(step=4)
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    log.write(step=5)
    with pytest.raises(RunError, match="1 lines could not be written"):
        log.close()
    assert len(lines(path)) == 4


def test_the_environment_is_told() -> None:
    found = diagnostics.environment()
    assert found["versions"]["torch"] == torch.__version__
    assert {"dsso", "python", "deepspeed", "transformers"} <= found["versions"].keys()
    assert found["command"]
    assert json.dumps(jsonable(found))
    assert diagnostics.peak_bytes(torch.device("cpu")) > 10_000_000


def row(name: str, owner: int | None, method: str = "KFAC", reason: str = "") -> dict[str, Any]:
    return {"parameter": name, "shape": (4, 64), "method": method, "owner": owner, "reason": reason}


def test_the_table_names_method_and_owner() -> None:
    text = method_table([row("a.weight", 0), row("b.weight", 1), row("norm", None, "adamw", "a norm")])
    first, *rest = text.splitlines()
    assert first.split() == ["parameter", "shape", "method", "owner", "reason"]
    assert rest[1].split() == ["b.weight", "4x64", "KFAC", "1"]
    assert rest[2].split() == ["norm", "4x64", "adamw", "all", "a", "norm"]
    assert rest[3] == "KFAC: 2 parameters, adamw: 1 parameters"


def test_a_long_table_is_folded() -> None:
    text = method_table([row(f"layer.{n}.q", n % 3) for n in range(50)] + [row("head", 0)])
    assert "layer.*.q  (50)" in text
    assert "0,1,2" in text
    assert "head" in text
    assert "KFAC: 51 parameters" in text
    assert len(text.splitlines()) == 4


HEALTH = {"cos_update_grad": 0.99999, "damping": 100.0, "factor_age": 3.0, "factor_failures": 0.0}


def test_a_method_that_does_nothing_says_so_once_and_why() -> None:
    watch = NoopWatch(20, "KFAC", {"damping_mode": "absolute"})
    told = [watch.update(step, HEALTH) for step in range(5, 60, 5)]
    assert [message is not None for message in told].index(True) == 3  # step 20: four logged steps of five
    assert sum(message is not None for message in told) == 1
    message = told[3]
    assert message is not None
    assert "KFAC is doing nothing" in message
    assert "dsso.train.noop_window = 20" in message
    assert "absolute damping of 100 is too strong" in message
    assert "set damping_mode to 'relative'" in message


def test_one_useful_step_starts_the_window_again() -> None:
    watch = NoopWatch(20, "KFAC", {})
    for step in range(5, 200, 5):
        useful = HEALTH | {"cos_update_grad": 0.9} if step % 20 == 0 else HEALTH
        assert watch.update(step, useful) is None
    assert watch.update(205, {}) is None
    told = [watch.update(step, HEALTH) for step in range(210, 300, 5)]
    assert sum(message is not None for message in told) == 1


def test_the_warning_goes_on_over_a_checkpoint() -> None:
    watch, other = NoopWatch(20, "KFAC", {}), NoopWatch(20, "KFAC", {})
    for step in (5, 10, 15):
        assert watch.update(step, HEALTH) is None
    other.restore(json.loads(json.dumps(watch.state())))
    assert other.update(20, HEALTH) is not None


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (HEALTH | {"factor_age": -1.0}, "no curvature has been inverted yet"),
        (HEALTH | {"factor_failures": 4.0}, "4 factorizations failed"),
        ({"cos_update_grad": 1.0}, "no parameter that the method takes"),
    ],
)
def test_reasons_for_doing_nothing(health: dict[str, float], words: str) -> None:
    watch = NoopWatch(1, "KFAC", {"damping_mode": "relative"})
    message = watch.update(1, health)
    assert message is not None
    assert words in message


def test_reasons_for_a_method_without_damping() -> None:
    watch = NoopWatch(1, "SHAMPOO", {"refresh_interval": 10, "start_step": 100, "epsilon": 0.5})
    told = watch.update(1, {"cos_update_grad": 1.0, "factor_age": -1.0})
    assert told is not None
    assert "let refresh_interval be due earlier" in told
    assert "up to step 100 (start_step)" in told
    assert "epsilon of 0.5" in told


def test_a_run_that_only_skips_ends_and_says_which() -> None:
    guard = SkipGuard(3)
    assert guard.check(10, {"skipped_steps": 1.0, "consecutive_skips": 0.0}, [0, 0]) is not None
    with pytest.raises(RunError) as caught:
        guard.check(20, {"skipped_steps": 5.0, "consecutive_skips": 3.0}, [0, 3])
    message = str(caught.value)
    assert "3 steps in a row were skipped, the last is step 20 (first: 18)" in message
    assert "the loss was not finite on rank 1 (3 micro-batches)" in message
    assert "dsso.train.max_consecutive_skips" in message
    with pytest.raises(RunError, match="the losses were finite, the gradients were not"):
        SkipGuard(3).check(20, {"skipped_steps": 5.0, "consecutive_skips": 3.0}, [0, 0])


def test_a_skipped_step_of_a_method_without_gradients_is_told_as_such() -> None:
    health = {"skipped_steps": 1.0, "consecutive_skips": 1.0, "slope": 3e9}
    told = SkipGuard(3).check(10, health, [0, 0])
    assert told is not None and "a slope not finite or too large" in told
    with pytest.raises(RunError, match=r"the slopes were not .or above optimizer.params.skip_slope"):
        SkipGuard(1).check(1, health, [0, 0])


def test_a_run_that_stands_still_is_told_once() -> None:
    watch = FlatWatch(3)
    flat, moved = [[0.0], [0.0]], [[0.0], [0.1]]
    assert [watch.update(step, flat) for step in (1, 2)] == [None, None]
    told = watch.update(3, flat)
    assert told is not None and "all slopes of the last 3 steps were zero" in told
    assert "dsso.train.noop_window" in told
    assert watch.update(4, flat) is None
    assert watch.update(5, moved) is None
    assert watch.update(6, []) is None  # a skipped step is no flat one
    assert [watch.update(step, flat) is None for step in (7, 8, 9)] == [True, True, False]


def test_steps_that_the_engine_itself_drops_count() -> None:
    guard, other = SkipGuard(5), SkipGuard(5)
    assert guard.check(2, {"skipped_steps": 0.0}, [0]) is None
    assert guard.check(4, {"skipped_steps": 2.0}, [0]) is not None
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.check(6, {"skipped_steps": 4.0}, [0]) is not None
    with pytest.raises(RunError, match=r"6 steps in a row were skipped, the last is step 8 \(first: 3\)"):
        other.check(8, {"skipped_steps": 6.0}, [0])
    # a good step in between
    assert guard.check(6, {"skipped_steps": 3.0}, [0]) is not None
    assert guard.check(8, {"skipped_steps": 5.0}, [0]) is not None


def test_a_dynamic_loss_scale_may_search() -> None:
    guard = SkipGuard(3, dynamic_scale=True)
    told = guard.check(9, {"skipped_steps": 9.0, "loss_scale": 128.0}, [0])
    assert told == (
        "step 9: 9 step(s) skipped on all ranks: the loss scale is being found, now 128; 9 in all"
    )
    with pytest.raises(RunError):
        guard.check(16, {"skipped_steps": 16.0, "loss_scale": 1.0}, [0])


def test_skipped_steps_are_told_when_their_number_grows() -> None:
    guard = SkipGuard(10)
    assert guard.check(10, {"skipped_steps": 0.0}, [0, 0]) is None
    told = guard.check(20, {"skipped_steps": 2.0}, [0, 1])
    assert told == (
        "step 20: 2 step(s) skipped on all ranks: non-finite loss on rank 1 (1 micro-batches); 2 in all"
    )
    assert guard.check(30, {"skipped_steps": 2.0}, [0, 0]) is None
    assert "non-finite gradient; 3 in all" in str(guard.check(40, {"skipped_steps": 3.0}, [0, 0]))
