"""What runs on a GPU machine is tried on a CPU, small; on a GPU it is run by `tests/gpu/run.sh`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def test_the_comparison_runs(command, tmp_path) -> None:
    small = ["--device", "cpu", "--layers", "2", "--width", "64", "--source", "16", "--steps", "4"]
    done = command([sys.executable, HERE / "t5.py", "--out", tmp_path, *small])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "t5.json").read_text())
    assert {"adamw", "exact", "low_rank"} <= set(found)
    assert found["exact"]["state_bytes"] > found["adamw"]["state_bytes"]
    assert found["adamw"]["steps"] == 4
    forms = found["forms"]
    assert forms["solve_over_inverse"] == forms["solve_s"] / forms["inverse_s"] > 0


def test_directions_and_mezo_run(command, tmp_path) -> None:
    small = ["--device", "cpu", "--layers", "2", "--width", "64", "--source", "16"]
    small += ["--elements", "5000", "--steps", "2"]
    done = command([sys.executable, HERE / "mezo.py", "--out", tmp_path, *small])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "mezo.json").read_text())
    assert found["gaussian_error"] < 1e-5
    for kind in ("rademacher", "gaussian"):
        assert found["passes"][kind]["bf16"]["share"] > 0
        step = found["steps"][kind]
        assert step["ratio"] == step["step_s"] / step["forwards_s"] > 0
        assert step["allowed_bytes"] > step["master_bytes"] == 2 * step["weight_bytes"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_laws_hold_on_one_device(command) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = command([sys.executable, HERE / "laws.py", "--device", device], timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1].removeprefix("worst ")) <= 1e-5


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_everything_in_nine_minutes(tmp_path) -> None:
    done = subprocess.run(["bash", HERE / "run.sh", "", tmp_path], timeout=540, check=False)
    assert done.returncode == 0
