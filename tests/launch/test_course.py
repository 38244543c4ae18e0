"""What happens on the way: warnings, skipped steps, patience, full disks, baselines, samples."""

from __future__ import annotations

import errno
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso import checkpoint
from dsso.tasks.models import MINILM_PACKAGE
from launch.loop import Loop
from launch.progress import Progress
from tests.conftest import Command
from tests.launch.runs import ROOT, checkpoints, lines, summary, train, write_recipe

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def test_a_method_that_does_nothing_warns(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    changes = {
        "optimizer.params": {"lr": 0.01, "damping": 1e12, "damping_mode": "absolute"},
        "dsso.train": {"max_steps": 12, "eval_interval": 12, "log_interval": 2, "noop_window": 6},
    }
    arguments = ("--ds_config", write_recipe(tmp_path, changes), "--output_dir", tmp_path / "out")
    assert train(monkeypatch, *arguments) == 0
    told = capfd.readouterr().out
    assert told.count("KFAC is doing nothing") == 1
    assert "why: most likely the absolute damping of 1e+12 is too strong" in told


def test_a_method_that_works_does_not_warn(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    changes = {"dsso.train": {"max_steps": 12, "eval_interval": 12, "log_interval": 2, "noop_window": 6}}
    arguments = ("--ds_config", write_recipe(tmp_path, changes), "--output_dir", tmp_path / "out")
    assert train(monkeypatch, *arguments) == 0
    assert "is doing nothing" not in capfd.readouterr().out


def poison(monkeypatch: Patch, steps: range) -> None:
    """Make the loss of these steps (from 0) not a number."""
    from dsso.tasks import PreparedTask

    whole = Loop._window
    honest = PreparedTask.loss_sum
    current = {"step": 0}

    def window(loop: Loop) -> None:
        current["step"] = loop.step
        whole(loop)

    def loss_sum(ready: Any, outputs: Any, batch: Any) -> torch.Tensor:
        loss = honest(ready, outputs, batch)
        return loss * float("nan") if current["step"] in steps else loss

    monkeypatch.setattr(Loop, "_window", window)
    monkeypatch.setattr(PreparedTask, "loss_sum", loss_sum)


def test_a_bad_batch_is_skipped_and_told(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    poison(monkeypatch, range(2, 3))
    out = tmp_path / "out"
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", out) == 0
    assert (
        "step 4: 1 step(s) skipped on all ranks: non-finite loss on rank 0 (2 micro-batches); 1 in all"
        in capfd.readouterr().out
    )
    assert summary(out)["skipped_steps"] == 1
    steps = lines(out)
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1, 1]
    assert steps[1]["bad_losses"] == 2
    assert all(line["loss"] is not None for line in steps)


def test_a_run_of_bad_batches_ends_it(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    poison(monkeypatch, range(3, 100))
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, {"dsso.train.max_consecutive_skips": 4})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out) == 1
    told = capfd.readouterr().err
    assert "max_consecutive_skips: 5 steps in a row were skipped, the last is step 8 (first: 4)" in told
    assert "the loss was not finite on rank 0 (4 micro-batches)" in told
    assert "remedy: lower the learning rate" in told
    assert "Traceback" not in told
    # the weights are what they were before: the checkpoint is worth going on from
    assert checkpoints(out) == ["step_00000004"]


def test_patience(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    changes = {
        "optimizer": {"type": "SGD", "params": {"lr": 1e-12}},
        "dsso.train": {"max_steps": 50, "eval_interval": 2, "log_interval": 2, "patience": 2},
    }
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, changes)
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out) == 0
    assert "no improvement in 2 evaluations: stopping (patience)" in capfd.readouterr().out
    found = summary(out)
    assert (found["ended"], found["steps"], found["best_step"], found["optimizer"]) == (
        "patience",
        6,
        2,
        "SGD",
    )
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--resume", "auto") == 0
    assert summary(out)["steps"] == 6


def fill_disk(monkeypatch: Patch, steps: set[int]) -> None:
    """Let the manifest of these checkpoints meet a full disk."""
    publish = checkpoint.Checkpointer._publish

    def full(keeper: Any, hidden: Path, tag: str, manifest: Any) -> None:
        if manifest["step"] in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(keeper, hidden, tag, manifest)

    monkeypatch.setattr(checkpoint.Checkpointer, "_publish", full)


def test_a_full_disk_on_the_way_is_a_warning(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    fill_disk(monkeypatch, {8})
    out = tmp_path / "out"
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", out) == 0
    told = capfd.readouterr().out
    assert "warning: " in told and "step_00000008 could not be written (rank 0: the disk is full" in told
    assert f"the last good one is {out}/checkpoints/step_00000004" in told
    assert checkpoints(out) == ["step_00000004", "step_00000010"]


def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    with monkeypatch.context() as patch:
        fill_disk(patch, {10})
        assert train(patch, "--ds_config", recipe, "--output_dir", out) == 1
    told = capfd.readouterr().err
    assert "step_00000010 could not be written" in told
    assert "remedy: make room on the disk" in told
    assert checkpoints(out) == ["step_00000004", "step_00000008"]
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--resume", "auto") == 0
    assert summary(out)["steps"] == 10


def test_best_weights_that_do_not_fit_leave_those_before(
    tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    from launch import best

    save = best.save_weights

    def full(path: Path, weights: Any) -> None:
        if "00000004" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, weights)

    monkeypatch.setattr(best, "save_weights", full)
    monkeypatch.setattr(best.Best, "improved_by", lambda self, metrics: True)
    out = tmp_path / "out"
    changes = {"dsso.train": {"max_steps": 4, "eval_interval": 2, "log_interval": 2}}
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path, changes), "--output_dir", out) == 0
    assert "the best weights (step 4) could not be written" in capfd.readouterr().out
    assert summary(out)["best_step"] == 2
    assert [path.name for path in (out / "best").glob("*.safetensors")] == ["step_00000002.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}, id="adamw"),
        pytest.param({"optimizer.params.fisher": "sampled"}, id="sampled"),
        pytest.param(
            {
                "optimizer.params.fisher": "sampled",
                "dsso.model.name": "tiny-t5",
                "dsso.peft": {"type": "lora"},
                "dsso.task.max_length": 64,
            },
            id="sampled-t5-prompt",
        ),
        pytest.param({"dsso.model.name": "tiny-opt", "dsso.task.max_length": 80}, id="opt-prompt"),
        pytest.param({"bf16": {"enabled": True}}, id="bf16"),
        pytest.param({"dsso.train": {"epochs": 0.5, "eval_interval": 4}}, id="epochs"),
        pytest.param({"dsso.peft": {"type": "none"}}, id="full"),
    ],
)
def test_other_recipes_run(changes: dict[str, Any], tmp_path: Path, monkeypatch: Patch) -> None:
    out = tmp_path / "out"
    short = {"dsso.train.max_steps": 3} if "dsso.train" not in changes else {}
    assert (
        train(monkeypatch, "--ds_config", write_recipe(tmp_path, short | changes), "--output_dir", out) == 0
    )
    found = summary(out)
    assert found["steps"] == (6 if "dsso.train" in changes else 3)
    assert found["skipped_steps"] == 0
    assert 0 <= found["test_metric"] <= 1
    assert (out / "adapter").exists() == (changes.get("dsso.peft") != {"type": "none"})


def test_a_batch_beyond_the_training_set_is_said(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    recipe = write_recipe(tmp_path, {"dsso.task.train_examples": 7, "dsso.train.max_steps": 1})
    words = "train_batch_size 8 is larger than the training set (7 examples)"
    arguments = ("--ds_config", recipe, "--output_dir", tmp_path / "out")
    assert train(monkeypatch, *arguments, "--check") == 0
    assert f"note         {words}" in capfd.readouterr().out
    assert train(monkeypatch, *arguments) == 0
    assert words in capfd.readouterr().out
    assert (
        train(monkeypatch, *arguments, "--check", "--resume", "auto", "--set", "dsso.task.train_examples=8")
        == 0
    )
    assert "is larger than the training set" not in capfd.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the package with the MiniLM weights is missing"
)
def test_no_bars_in_a_log(tmp_path: Path, command: Command) -> None:
    changes = {"dsso.model.name": "minilm", "dsso.train": {"max_steps": 1}, "dsso.task.eval_examples": 4}
    words = [sys.executable, ROOT / "launch/train.py", "--ds_config", write_recipe(tmp_path, changes)]
    done = command([*words, "--output_dir", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stdout + done.stderr


def test_a_small_clip_scale_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(0, 10, speak=True).figures(3, {"loss": 1.0, "clip_scale": 0.003127, "seconds": 1.0})
    assert "clip 0.00313" in capsys.readouterr().out


def test_debug_logs_every_step(tmp_path: Path, monkeypatch: Patch) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, {"dsso.train.max_steps": 3})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, "--debug") == 0
    assert [line["step"] for line in lines(out)] == [1, 2, 3]


def test_only_logging_steps_look_at_the_device(tmp_path: Path, monkeypatch: Patch) -> None:
    looked: list[tuple[str, str]] = []
    place = {"now": "elsewhere"}
    own = str(ROOT / "launch")

    def watched(name: str) -> Any:
        honest = getattr(torch.Tensor, name)

        def look(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(own):
                looked.append((place["now"], name))
            return honest(tensor, *arguments, **options)

        return look

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    for part in ("_window", "_log_step", "save"):
        whole = getattr(Loop, part)

        def marked(loop: Loop, *arguments: Any, whole: Any = whole, part: str = part) -> None:
            before, place["now"] = place["now"], part
            whole(loop, *arguments)
            place["now"] = before

        monkeypatch.setattr(Loop, part, marked)
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", tmp_path / "out") == 0
    assert {where for where, _ in looked} == {"_log_step", "save"}
