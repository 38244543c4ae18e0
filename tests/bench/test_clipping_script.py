"""The clipping benchmark runs, can be resumed, and judges curves as it says."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.bench import clipping, results_file, stability

SMALL = ["--model", "tiny-bert", "--tasks", "builtin", "--steps", "6", "--batch", "4", "--max-length", "24"]


def line(losses, constant=1.0):
    curves = {"loss": losses, "step_length": [0.1], "clipped": [1.0], "cos": [0.5]}
    return {"constant_loss": constant, "curves": curves}


def judged(losses, constant=1.0):
    found = stability.verdict(line(losses, constant))
    return found["diverged"], found["spikes"], found["learned"]


def test_script_runs_and_goes_on_where_it_was_stopped(command, tmp_path, capsys):
    argv = [*SMALL, "--only", "none", "post", "--out", str(tmp_path)]
    done = command([sys.executable, clipping.__file__, *argv])
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert {name: one["runs"] for name, one in counts.items()} == {"mean/none": 1, "mean/post": 1}
    assert (tmp_path / "clipping.png").stat().st_size > 5000
    file = tmp_path / "clipping.jsonl"
    lines = {one["case"]["clip"]: one for one in results_file.read(file)}
    post = lines["post"]["curves"]
    assert max(post["step_length"]) <= clipping.FIRST_LR * clipping.FIRST_TAU * 1.001
    assert max(lines["none"]["curves"]["step_length"]) > 100 * max(post["step_length"])

    # the second line is cut short, as by a full disk: that run is repeated, and gives the same curve
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 40])
    assert clipping.main(argv) == 0
    assert "2 runs, 1 of them finished before" in capsys.readouterr().out
    repeated = {one["case"]["clip"]: one for one in results_file.read(file)}
    assert repeated["none"] == lines["none"]
    assert repeated["post"]["curves"] == post


def test_script_skips_without_data(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DSSO_DATA", raising=False)
    assert clipping.main(["--out", str(tmp_path)]) == 0
    assert "DSSO_DATA is not set" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_scale_of_the_mean_loss_is_n_squared_smaller():
    averages = {}
    for sense in ("mean", "term"):
        case = clipping.Case(
            "builtin", "post", sense, 0.01, 1.0, model="tiny-bert", steps=1, batch=4, max_length=24
        )
        engine, data = clipping.start(case)
        clipping.window(case, engine, data, 0)
        averages[sense] = {name: one.matrix() for name, one in engine.optimizer.method.factors.items()}
        engine.close()
    assert averages["mean"]
    for name, small in averages["mean"].items():
        factor = 4**2 if name.endswith("/g") else 1
        torch.testing.assert_close(small * factor, averages["term"][name], rtol=1e-4, atol=1e-12)


def test_grid_and_modes_share_runs():
    cases = clipping.plan(clipping.parse([]))
    assert len([case for case in cases if case.clip == "post"]) == 24
    assert len({case.key for case in cases}) == len(cases) == 28


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param([1.0] * 20, (False, 0, False), id="stands-still"),
        pytest.param([1.0] * 10 + [0.5] * 10, (False, 0, True), id="learns"),
        pytest.param([1.0] * 10 + [3.0] * 10, (True, 5, False), id="ends-high"),
        pytest.param([1.0] * 10 + [None] + [0.5] * 10, (True, 1, False), id="not-finite"),
        pytest.param([1.0] * 9 + [2.5] + [0.5] * 10, (False, 1, True), id="spikes-and-learns"),
        pytest.param([1.0] * 10 + [0.1] * 10 + [0.9] + [0.1] * 9, (False, 0, True), id="noise-at-a-low-loss"),
        pytest.param([8.0] + [8.0] * 19, (False, 0, False), id="starts-above-the-constant"),
    ],
)
def test_verdicts(losses, expected):
    assert judged(losses) == expected


def test_constant_loss():
    assert stability.constant_loss([0.0, 1.0, 1.0, 0.0], "cross_entropy") == pytest.approx(0.693147, abs=1e-6)
    assert stability.constant_loss([0.0, 2.0], "mse") == pytest.approx(1.0)
