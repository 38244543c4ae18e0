"""Objectives other than the loss through the one entry: trained, on replicas, and refused where they cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dsso import tasks
from dsso.config import ModelConfig, TaskConfig
from tests.launch.runs import ROOT, lines, train, write_recipe

CONFIGS = ROOT / "configs"
SINGLE, REPLICAS = CONFIGS / "mezo_tiny_roberta_full_single.json", CONFIGS / "mezo_tiny_t5_lora_ddp.json"
Command = Callable[..., Any]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

MODULE = """
import torch

def recall(outputs, batch):
    made = outputs.logits.argmax(-1)
    right = (made == batch.labels) & (batch.labels == 1)
    return torch.stack([right.sum(), (batch.labels == 1).sum(), torch.tensor(len(made))])

recall.value = lambda sums: 1 - sums[0] / sums[1]

def three(outputs, batch):
    return torch.ones(3)

def scalar(outputs, batch):
    return outputs.logits.sum()

def grows(outputs, batch):
    grows.calls += 1
    return torch.ones(2 + grows.calls // 3)

grows.calls = 0
grows.value = lambda sums: sums.sum()

def sometimes(outputs, batch):
    sometimes.calls += 1
    bad = 30 < sometimes.calls <= 33
    return torch.tensor([float("nan") if bad else float(outputs.logits.square().mean()), 1.0])

sometimes.calls = 0

def nothing(outputs, batch):
    return torch.tensor([float("nan"), 1.0])
"""


def setting(**values: object) -> list[str]:
    """`--set` for keys of `dsso.train`, and of `optimizer.params` where they begin with p_."""
    words = []
    for key, value in values.items():
        path = f"optimizer.params.{key[2:]}" if key.startswith("p_") else f"dsso.train.{key}"
        words += ["--set", f"{path}={value}"]
    return words


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / f"step_{step:08d}" / "dsso").glob("partition_rank*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def test_the_logged_loss_is_one_minus_the_accuracy(tmp_path: Path, monkeypatch: Patch) -> None:
    """Perturbations too small for another answer: every step is flat, and shows the model as it is."""
    words = ["--ds_config", SINGLE, "--output_dir", tmp_path / "run", "--set", "dsso.task.train_examples=8"]
    more = setting(objective="accuracy", max_steps=2, save_interval=1, p_eps=1e-12)
    assert train(monkeypatch, *words, *more) == 0
    config = TaskConfig(name="builtin", max_length=48, train_examples=8, eval_examples=16)
    task = tasks.load_task(config, 0)
    bundle = tasks.models.load(ModelConfig(name="tiny-roberta"), task, config)
    accuracy = tasks.prepare(task, bundle, config).evaluate(bundle.model, "train", 4)["accuracy"]
    assert 0 < accuracy < 1
    for number, line in enumerate(lines(tmp_path / "run"), 1):
        assert line["loss"] == pytest.approx(1 - accuracy, abs=1e-6)
        assert (line["slope"], line["flat_steps"], line["skipped_steps"]) == (0, number, 0)
    before, after = weights(tmp_path / "run", 1), weights(tmp_path / "run", 2)
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("objective", ["accuracy", "f1", "my_metrics:recall"])
def test_a_run_moves_by_answers(tmp_path: Path, monkeypatch: Patch, objective: str) -> None:
    (tmp_path / "my_metrics.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    words = ["--ds_config", SINGLE, "--output_dir", tmp_path / "run"]
    more = setting(
        objective=objective, max_steps=4, p_eps=0.2, p_lr=0.01, p_directions=1, save_interval=1, keep_last=9
    )
    assert train(monkeypatch, *words, *more) == 0
    steps = lines(tmp_path / "run")
    assert all(0 <= line["loss"] <= 1 for line in steps)
    assert any(line["slope"] > 0 for line in steps)
    if objective == "accuracy":  # eight examples, two evaluations
        assert all(float(line["loss"] * 16).is_integer() for line in steps)
    for line, before in zip(steps[1:], steps, strict=False):
        old, new = (weights(tmp_path / "run", one["step"]) for one in (before, line))
        assert old.keys() == new.keys() != set()
        flat = line["flat_steps"] > before["flat_steps"]
        assert flat == (line["slope"] == 0)
        assert flat == all(torch.equal(new[name], value) for name, value in old.items())


def test_a_run_moves_by_what_is_written(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "squad").mkdir()
    rows = [
        {
            "context": f"text {n}",
            "question": "q",
            "answers": {"text": list("abcdefghijklmnopqrstuvwxyz0123456789"), "answer_start": [0]},
        }
        for n in range(16)
    ]
    for split in ("train", "validation"):
        (tmp_path / "squad" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "squad", "data_dir": str(tmp_path), "max_length": 60, "max_target_length": 1}
    changes = {
        "optimizer": {"type": "MeZO", "params": {"lr": 0.05, "eps": 0.3}},
        "dsso.engine": "single",
        "zero_optimization": None,
        "dsso.model": {"name": "tiny-opt"},
        "dsso.peft": {"type": "none"},
        "dsso.task": task,
        "dsso.train": {"max_steps": 6, "eval_interval": 6, "log_interval": 1, "objective": "exact_match"},
    }
    recipe = write_recipe(tmp_path, changes)
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "run") == 0
    steps = lines(tmp_path / "run")
    assert all(float(line["loss"] * 16).is_integer() for line in steps), "eight texts, written twice"
    assert {line["slope"] > 0 for line in steps} == {True, False}
    assert steps[-1]["flat_steps"] == sum(line["slope"] == 0 for line in steps)


@pytest.mark.dist
def test_two_replicas_count_what_one_process_counts(
    tmp_path: Path, monkeypatch: Patch, command: Command
) -> None:
    # Words of one token, so that an answer changes at all: a LoRA of a tiny random model moves little.
    more = [*setting(objective="f1", p_eps=1.0, p_lr=0.1), "--set", 'dsso.task.verbalizer=["a", "b"]']
    assert train(monkeypatch, "--ds_config", REPLICAS, "--output_dir", tmp_path / "one", *more) == 0
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch" / "train.py"]
    done = command([*head, "--ds_config", REPLICAS, "--output_dir", tmp_path / "two", *more])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert any(line["slope"] > 0 for line in one)
    for mine, theirs in zip(two, one, strict=True):
        for figure in ("loss", "slope", "flat_steps"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "objective", "words"),
    [
        (SINGLE, "acuracy", ["unknown objective", "got: 'acuracy'", "nearest: 'accuracy'"]),
        (SINGLE, "exact_match", ["'builtin' cannot be judged so", "its answers are classes", "remedy: "]),
        (SINGLE, "no_such_module:f", ["there is no module 'no_such_module'", "PYTHONPATH"]),
        (SINGLE, "json:dumpz", ["'json'", "has no such function", "nearest: 'dump'"]),
        (None, "accuracy", ["KFAC needs gradients of the loss", "allowed: loss", "only losses: HIZOO, MEZO"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    recipe: Path | None, objective: str, words: list[str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = recipe or write_recipe(tmp_path)
    for check in ([], ["--check"]):
        out = tmp_path / "out"
        more = [*setting(objective=objective), *check]
        assert train(monkeypatch, "--ds_config", path, "--output_dir", out, *more) == 2
        told = capfd.readouterr().err
        assert told.lstrip().startswith("recipe error: dsso.train.objective: ")
        assert all(word in told for word in words), told
        assert not out.exists()


def test_a_baseline_needs_gradients_too(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    recipe = write_recipe(tmp_path, {"optimizer": {"type": "AdamW"}, "dsso.train.objective": "accuracy"})
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "out") == 2
    assert "AdamW needs gradients of the loss" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_now_and_then_is_skipped_and_told(
    tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    """The figures of the others are the mean of what is finite."""
    (tmp_path / "my_metrics.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    more = setting(objective="my_metrics:sometimes", log_interval=8)
    assert train(monkeypatch, "--ds_config", SINGLE, "--output_dir", tmp_path / "out", *more) == 0
    (line,) = [one for one in lines(tmp_path / "out") if "loss" in one]
    assert 0 < line["loss"] < float("inf")
    assert line["skipped_steps"] >= 1
    assert line["bad_losses"] == 3
    assert "non-finite loss on rank 0 (3 micro-batches)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("three", ["my_metrics:three must return two numbers, whose ratio is lowered", "got: 3", "'value'"]),
        ("scalar", ["my_metrics:scalar must return sums over the micro-batch as one vector", "shape ()"]),
        ("grows", ["my_metrics:grows returned another number of sums than before", "allowed: 2"]),
        ("nothing", ["3 steps in a row were skipped", "the loss was not finite on rank 0"]),
    ],
)
def test_sums_that_cannot_be_used_end_the_run(
    function: str, words: list[str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    (tmp_path / "my_metrics.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    more = setting(objective=f"my_metrics:{function}", max_consecutive_skips=3)
    assert train(monkeypatch, "--ds_config", SINGLE, "--output_dir", tmp_path / "out", *more) == 1
    told = capfd.readouterr().err
    assert "\nerror: dsso.train." in told
    assert all(word in told for word in words), told
    assert "Traceback" not in told
