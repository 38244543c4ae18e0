"""Runs in one process: what they write, how they stop, how they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from launch.loop import Loop
from tests.launch.runs import checkpoints, config, lines, partitions, summary, train, write_recipe

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def stop_after(monkeypatch: Patch, step: int, signum: int = signal.SIGINT) -> None:
    """Send this process a signal when it has taken `step` steps."""
    after = Loop._after_step

    def patched(loop: Loop) -> int | None:
        if loop.step == step:
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
        return after(loop)

    monkeypatch.setattr(Loop, "_after_step", patched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, "--ds_config", write_recipe(folder), "--output_dir", folder / "out") == 0
    return folder / "out"


def test_what_a_run_writes(whole: Path) -> None:
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "best", "adapter"} == {
        path.name for path in whole.iterdir()
    }
    steps = lines(whole)
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10]
    assert {"loss", "lr", "update_norm", "clip_scale", "cos_update_grad", "damping", "factor_age"} <= steps[
        0
    ].keys()
    assert all(line["lr"] == 0.02 and line["skipped_steps"] == 0 for line in steps)
    evaluations = [line["eval"] for line in lines(whole, steps=False)]
    assert [(one["split"], one["step"]) for one in evaluations] == [
        ("validation", 5),
        ("validation", 10),
        ("test", 10),
    ]
    assert checkpoints(whole) == ["step_00000008", "step_00000010"]


def test_every_file_has_the_permissions_that_the_umask_leaves(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    ordinary = (tmp_path / "probe").stat().st_mode
    other = [path for path in whole.rglob("*") if path.is_file() and path.stat().st_mode != ordinary]
    assert other == []


def test_what_the_summary_says(whole: Path) -> None:
    found = summary(whole)
    values = [line["eval"] for line in lines(whole, steps=False)]
    best = max(values[:2], key=lambda one: (one["metrics"]["accuracy"], -one["step"]))
    assert (found["optimizer"], found["steps"], found["world_size"], found["ended"]) == (
        "KFAC",
        10,
        1,
        "finished",
    )
    assert (found["best_metric"], found["best_step"]) == (best["metrics"]["accuracy"], best["step"])
    assert found["test_metric"] == values[2]["metrics"]["accuracy"]
    assert found["train_loss"] == lines(whole)[-1]["loss"]
    assert found["wall_seconds"] > 0
    assert found["peak_bytes"] > found["state_bytes"] > 0
    assert 0.2 <= found["majority_baseline"]["accuracy"] <= 0.8


def test_what_the_configuration_says(whole: Path) -> None:
    found = config(whole)
    assert found["optimizer"] == "KFAC"
    assert found["resolved"]["train_batch_size"] == 8
    assert found["versions"]["torch"] == torch.__version__
    assert "--output_dir" in found["command"]
    assert {row["method"] for row in found["parameters"]} >= {"KFAC"}
    assert len(found["starts"]) == 1


def test_the_best_weights_are_what_is_exported(whole: Path) -> None:
    best = json.loads((whole / "best" / "best.json").read_text())
    weights = safetensors.torch.load_file(whole / "best" / best["file"])
    assert best["step"] == summary(whole)["best_step"]
    exported = list((whole / "adapter").glob("*.safetensors"))
    assert len(exported) == 1
    tensors = safetensors.torch.load_file(exported[0])
    assert sorted(tensor.shape for tensor in tensors.values()) == sorted(
        tensor.shape for tensor in weights.values()
    )
    for tensor in tensors.values():
        assert any(one.shape == tensor.shape and torch.equal(one, tensor) for one in weights.values())


@pytest.mark.parametrize("step", [7, 9])
def test_an_interrupted_run_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture, step: int
) -> None:
    recipe = write_recipe(tmp_path)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert train(patch, "--ds_config", recipe, "--output_dir", out) == 130
    told = capfd.readouterr()
    assert "SIGINT: writing a checkpoint after this step" in told.err
    assert f"stopped after step {step}; --resume auto goes on" in told.out
    assert checkpoints(out)[-1] == f"step_{step:08d}"
    assert not (out / "summary.json").exists()
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--resume", "auto") == 0
    assert f"going on from {out}/checkpoints/step_{step:08d} (step {step})" in capfd.readouterr().out
    assert lines(out) == lines(whole)
    assert lines(out, steps=False) == lines(whole, steps=False)
    mine, theirs = partitions(out), partitions(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [one["step"] for one in config(out)["starts"]] == [0, step]


def test_sigterm_has_its_own_status(tmp_path: Path, monkeypatch: Patch) -> None:
    stop_after(monkeypatch, 2, signal.SIGTERM)
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", tmp_path / "out") == 143
    assert checkpoints(tmp_path / "out") == ["step_00000002"]


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run, to do something to."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_run_is_only_tested_again(
    copied: Path, tmp_path: Path, monkeypatch: Patch, whole: Path
) -> None:
    arguments = ("--ds_config", write_recipe(tmp_path), "--output_dir", copied, "--resume", "auto")
    assert train(monkeypatch, *arguments) == 0
    assert lines(copied) == lines(whole)
    assert lines(copied, steps=False) == lines(whole, steps=False)


def test_a_directory_that_holds_another_run_is_refused(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    recipe = write_recipe(tmp_path, {"dsso.train.max_steps": 2})
    before = sorted(copied.rglob("*"))
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", copied) == 2
    told = capfd.readouterr().err
    assert "recipe error: output_dir: holds another run (config.json, metrics.jsonl" in told
    assert "--resume auto goes on with it, --overwrite starts again in its place" in told
    assert sorted(copied.rglob("*")) == before
    (copied / "notes.txt").write_text("mine")
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", copied, "--overwrite") == 0
    assert summary(copied)["steps"] == 2
    assert checkpoints(copied) == ["step_00000002"]
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_checkpoint_cut_short_is_skipped_and_it_is_said(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture, whole: Path
) -> None:
    newest = copied / "checkpoints" / "step_00000010"
    file = newest / "dsso" / "partition_rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    arguments = ("--ds_config", write_recipe(tmp_path), "--output_dir", copied, "--resume", "auto")
    assert train(monkeypatch, *arguments) == 0
    told = capfd.readouterr().out
    assert (
        f"checkpoint {newest} is skipped: dsso/partition_rank00000.safetensors has 100 bytes instead of"
        in told
    )
    assert f"going on from {copied}/checkpoints/step_00000008" in told
    assert lines(copied) == lines(whole)


def test_without_a_usable_checkpoint_it_starts_again(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture, whole: Path
) -> None:
    for name in checkpoints(copied):
        (copied / "checkpoints" / name / "manifest.json").unlink()
    arguments = ("--ds_config", write_recipe(tmp_path), "--output_dir", copied, "--resume", "auto")
    assert train(monkeypatch, *arguments) == 0
    told = capfd.readouterr().out
    assert "no manifest.json: writing it was cut short" in told
    assert "no usable checkpoint: starting from the beginning" in told
    assert lines(copied) == lines(whole)


def test_another_run_can_be_continued_elsewhere(
    whole: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    recipe = write_recipe(tmp_path, {"dsso.train.max_steps": 12})
    out = tmp_path / "more"
    source = whole / "checkpoints" / "step_00000008"
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--resume", source) == 0
    assert "the recipe has changed since: dsso.train.max_steps: 10 -> 12" in capfd.readouterr().out
    assert [line["step"] for line in lines(out)] == [10, 12]
    assert lines(out)[0] == lines(whole)[-1]
    assert checkpoints(whole) == ["step_00000008", "step_00000010"]


def test_an_older_checkpoint_is_not_taken_in_silence(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    source = copied / "checkpoints" / "step_00000008"
    arguments = ("--ds_config", write_recipe(tmp_path), "--output_dir", copied, "--resume", source)
    assert train(monkeypatch, *arguments) == 2
    assert "step_00000010 is newer and would be removed" in capfd.readouterr().err
    assert train(monkeypatch, *arguments, "--overwrite") == 0
    assert summary(copied)["steps"] == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dsso.peft.bottleneck": 4}, "dsso.peft.bottleneck: differs from the run that wrote"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}, "optimizer.type: differs from the run"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture, changes: dict[str, Any], words: str
) -> None:
    recipe = write_recipe(tmp_path, changes)
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", copied, "--resume", "auto") == 2
    assert words in capfd.readouterr().err


def test_a_checkpoint_in_other_files_is_refused_and_left_alone(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    for name in checkpoints(copied):
        folder = copied / "checkpoints" / name
        (folder / "dsso" / "engine.json").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["dsso/engine.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    arguments = ("--ds_config", write_recipe(tmp_path), "--output_dir", copied, "--resume", "auto")
    assert train(monkeypatch, *arguments) == 1
    assert "the checkpoint has no dsso/engine.json" in capfd.readouterr().err
    assert checkpoints(copied) == ["step_00000008", "step_00000010"]


def test_another_global_batch_is_said(
    copied: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    recipe = write_recipe(tmp_path, {"gradient_accumulation_steps": 1, "dsso.train.max_steps": 12})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", copied, "--resume", "auto") == 0
    told = capfd.readouterr().out
    assert "train_batch_size: 8 -> 4" in told
    assert "warning: another global batch" in told
    assert summary(copied)["steps"] == 12
