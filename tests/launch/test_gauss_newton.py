"""Windows of estimation under the launchers: the same course on every engine, and no step counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import ROOT, lines, summary, train

RECIPE = ROOT / "configs" / "sophia_tiny_llama_full_zero3.json"
Command = Callable[..., Any]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_take_the_steps_of_one_process(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    alone = ["--set", "dsso.engine=single", "--set", "zero_optimization=null"]
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", tmp_path / "one", *alone) == 0
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch" / "train.py"]
    where = ["--set", f"zero_optimization.stage={stage}"]
    done = command([*head, "--ds_config", RECIPE, "--output_dir", tmp_path / "two", *where])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 9))
    for mine, theirs in zip(two, one, strict=True):
        assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["win_rate"] == pytest.approx(theirs["win_rate"], abs=1e-3)
    assert two[-1]["estimates"] == 4
    assert summary(tmp_path / "two")["optimizer"] == "SOPHIA"


def test_a_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--ds_config", RECIPE, "--set", "dsso.engine=single", "--set", "zero_optimization=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(monkeypatch, *given, "--output_dir", whole) == 0
    # The schedule is that of the whole run.
    half = ["--set", "scheduler.params.total_num_steps=8", "--set", "dsso.train.max_steps=4"]
    assert train(monkeypatch, *given, "--output_dir", parts, *half) == 0
    assert train(monkeypatch, *given, "--output_dir", parts, "--resume", "auto") == 0
    told = [{key: value for key, value in line.items() if key != "seconds"} for line in lines(parts)]
    wanted = [{key: value for key, value in line.items() if key != "seconds"} for line in lines(whole)]
    assert [(line["loss"], line["win_rate"], line["estimates"]) for line in told] == [
        (line["loss"], line["win_rate"], line["estimates"]) for line in wanted
    ]
