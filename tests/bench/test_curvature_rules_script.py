"""The benchmark of the two rules runs, asks what it says, and names the best damping."""

from __future__ import annotations

import json
import sys

import pytest

from dsso.optim import resolve
from tests.bench import curvature_rules, results_file


@pytest.mark.parametrize(
    ("share", "renewed"), [(0.0, [0]), (0.1, [0, 1]), (0.5, list(range(10))), (1.0, list(range(20)))]
)
def test_curvature_is_renewed_in_a_share_of_the_run(share, renewed):
    config = resolve("Shampoo").Config(refresh_interval=curvature_rules.until(share, 20))
    assert [step for step in range(20) if config.refresh_interval.due(step)] == renewed


def test_the_best_damping_is_the_one_of_the_least_loss():
    def one(value, losses, batch=8):
        place = {"rule": "damping", "task": "mrpc", "method": "KFAC", "batch": batch}
        return {**place, "value": value, "values": losses, "lr": 0.1, "inside": True, "steps": 1}

    nan = float("nan")
    answers = [one(1e-2, [2.0, 1.0]), one(0.1, [1.0, 1.2]), one(1.0, [nan, 0.1]), one(1.0, [0.5], batch=16)]
    found = curvature_rules.summary(answers)
    assert found["best_damping"] == {"mrpc/8": 0.1, "mrpc/16": 1.0}
    assert found["damping"]["mrpc/8"] == {"0.01": 1.5, "0.1": 1.1, "1": None}


def test_the_script_runs(command, tmp_path):
    argv = ["--tasks", "builtin", "--model", "tiny-bert", "--epochs", "1", "--limit", "16"]
    argv += ["--batches", "8", "0", "--jobs", "1", "--out", str(tmp_path)]
    done = command([sys.executable, curvature_rules.__file__, *argv])
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["early"].keys() == {"builtin/KFAC", "builtin/Shampoo"}
    assert all(len(course) == 6 for rule in ("early", "damping") for course in last[rule].values())
    assert last["best_damping"].keys() == {"builtin/8", "builtin/all"}
    assert all(loss > 0 for course in last["damping"].values() for loss in course.values())
    assert (tmp_path / "curvature_rules.png").stat().st_size > 5000
    lines = results_file.read(tmp_path / "runs.jsonl")
    assert {line["case"]["seed"] for line in lines} == {0, 1, 2, 3}


def test_the_script_skips_without_data(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DSSO_DATA", raising=False)
    assert curvature_rules.main(["--out", str(tmp_path)]) == {}
    assert "DSSO_DATA is not set" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
