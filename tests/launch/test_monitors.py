"""What DeepSpeed tells of a run by its own keys, under our optimizers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.launch.runs import ROOT, free_port, lines, train, write_recipe

MEZO = {"optimizer": {"type": "MeZO", "params": {"lr": 1e-3, "eps": 1e-3}}}
SWITCHES = {
    "tensorboard": {"enabled": True},
    "csv_monitor": {"enabled": True},
    "flops_profiler": {"enabled": True},
    "comms_logger": {"enabled": True},
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
}


@pytest.mark.timeout(240)
def test_profiler_logger_and_monitors_of_deepspeed(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("tensorboard")
    folders = {
        name: {"enabled": True, "output_path": str(tmp_path / name), "job_name": "tiny"} for name in MONITORS
    }
    changes = {
        "dsso.train.max_steps": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": "auto",
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "flops.txt")},
        "comms_logger": {"enabled": True, "prof_all": True},
        **folders,
    }
    # One rank with a launcher's variables: DeepSpeed's engine, and no other process to wait for.
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    words = [sys.executable, ROOT / "launch/train.py", "--ds_config", write_recipe(tmp_path, changes)]
    done = command([*words, "--output_dir", tmp_path / "out"], env=place | {"MASTER_PORT": str(free_port())})
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "fwd MACs per GPU" in (tmp_path / "flops.txt").read_text()
    assert "Comm. Op" in told, "the summary of the comms logger"
    written = {
        path.stem.removeprefix("Train_Samples_"): path
        for path in (tmp_path / "csv_monitor/tiny").glob("*.csv")
    }
    assert {"lr", "loss", "update_norm", "clip_scale", "cos_update_grad", "damping"} <= set(written)
    rows = [row.split(",") for row in written["loss"].read_text().split()[1:]]
    logged = lines(tmp_path / "out")
    assert [int(examples) for examples, _ in rows] == [8 * line["step"] for line in logged]
    assert [float(loss) for _, loss in rows] == pytest.approx([line["loss"] for line in logged])
    events = next((tmp_path / "tensorboard/tiny").glob("events.out.tfevents.*"))
    assert b"Train/Samples/update_norm" in events.read_bytes()


MONITORS = ("tensorboard", "csv_monitor")


@pytest.mark.parametrize("key", SWITCHES)
def test_they_are_refused_for_methods_from_forward_passes(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, MEZO | {key: SWITCHES[key]})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"recipe error: {key}" in told
    assert "DeepSpeed's training step" in told
    assert "remedy: remove it" in told


def test_a_monitor_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "wandb" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    recipe = write_recipe(tmp_path, {"wandb": {"enabled": True}})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "out") == 2
    assert "wandb.enabled: needs the package wandb" in capsys.readouterr().err
