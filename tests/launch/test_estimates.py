"""Windows of estimation under the launchers: the same course on every engine, and no step counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import ROOT, lines, summary, train

FIGURES = {
    "sophia": {"win_rate": 1e-3, "estimates": 0.0},
    "gauss_newton": {"cg_iterations": 0.0, "cg_residual": 1e-3, "damping": 1e-3},
}
"""Of the last step, by method, and how far they may lie apart."""
Command = Callable[..., Any]
every = pytest.mark.parametrize("method", FIGURES)


def recipe(method: str) -> Path:
    return ROOT / "configs" / f"{method}_tiny_llama_full_zero3.json"


@every
@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_take_the_steps_of_one_process(
    stage: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    given = ["--ds_config", recipe(method), "--output_dir"]
    alone = ["--set", "dsso.engine=single", "--set", "zero_optimization=null"]
    assert train(monkeypatch, *given, tmp_path / "one", *alone) == 0
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch" / "train.py"]
    done = command([*head, *given, tmp_path / "two", "--set", f"zero_optimization.stage={stage}"])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 9))
    for mine, theirs in zip(two, one, strict=True):
        assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name, apart in FIGURES[method].items():
            assert mine[name] == pytest.approx(theirs[name], abs=apart)
    assert two[-1].get("estimates", 4) == 4
    assert summary(tmp_path / "two")["optimizer"] == method.upper()


@every
def test_a_run_and_its_continuation(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ["--set", "dsso.engine=single", "--set", "zero_optimization=null"]
    given = ["--ds_config", recipe(method), *alone]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(monkeypatch, *given, "--output_dir", whole) == 0
    # The schedule is that of the whole run.
    half = ["--set", "scheduler.params.total_num_steps=8", "--set", "dsso.train.max_steps=4"]
    assert train(monkeypatch, *given, "--output_dir", parts, *half) == 0
    assert train(monkeypatch, *given, "--output_dir", parts, "--resume", "auto") == 0

    def told(folder: Path) -> list[list[float]]:
        return [[line[name] for name in ("loss", *FIGURES[method])] for line in lines(folder)]

    assert told(parts) == told(whole)
    assert len(told(whole)) == 8
