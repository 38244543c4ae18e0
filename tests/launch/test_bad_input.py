"""What cannot be used is refused with status 2 and a message, before anything is started or written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests.conftest import Command
from tests.launch.runs import ROOT, train, write_recipe

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

RECIPES: list[Any] = [
    pytest.param(
        {"gradient_cliping": 1.0}, ["gradient_cliping", "nearest: 'gradient_clipping'"], id="top-level"
    ),
    pytest.param(
        {"optimizer.params.dampin": 1}, ["optimizer.params.dampin", "nearest: 'damping'"], id="params"
    ),
    pytest.param({"dsso.train.max_step": 1}, ["dsso.train.max_step", "nearest: 'max_steps'"], id="dsso"),
    pytest.param({"optimizer.params.tau": 0}, ["optimizer.params.tau", "got: 0"], id="tau"),
    pytest.param({"optimizer.params.damping": -1}, ["optimizer.params.damping", "got: -1"], id="damping"),
    pytest.param(
        {"optimizer.params.factor_interval": 0}, ["optimizer.params.factor_interval"], id="interval"
    ),
    pytest.param(
        {"optimizer.type": "KFACC"}, ["optimizer.type", "'KFACC'", "remedy: write 'KFAC'"], id="type"
    ),
    pytest.param({"dsso.train.max_steps": "10"}, ["dsso.train.max_steps", "got: '10'"], id="wrong-type"),
    pytest.param(
        {"dsso.peft": {"type": "lora", "r": 1000}}, ["dsso.peft.r", "got: 1000"], id="rank-above-dimension"
    ),
    pytest.param(
        {"gradient_clipping": "auto", "optimizer": {"type": "AdamW"}},
        ["gradient_clipping: 'auto' cannot be filled in"],
        id="auto",
    ),
    pytest.param(
        {"fp16": {"enabled": True}, "zero_optimization.stage": 0},
        ["fp16", "stage", "remedy:"],
        id="fp16-stage-0",
    ),
    pytest.param(
        {"zero_optimization.round_robin_gradients": True},
        ["round_robin_gradients", "remedy:"],
        id="round-robin",
    ),
    pytest.param(
        {"zero_optimization.offload_optimizer": {"device": "cpu"}},
        ["offload_optimizer", "remedy:"],
        id="offload",
    ),
    pytest.param({"train_batch_size": 7}, ["train_batch_size"], id="batch-sizes"),
    pytest.param({"dsso.task.name": "mrcp"}, ["dsso.task.name", "'mrcp'", "nearest: 'mrpc'"], id="task"),
    pytest.param(
        {
            "dsso.task.head": "prompt",
            "dsso.model.name": "tiny-t5",
            "dsso.task.verbalizer": ["no", "yes", "maybe"],
        },
        ["dsso.task.verbalizer", "3"],
        id="verbalizer",
    ),
    pytest.param({"dsso.model.name": "no/such-model"}, ["dsso.model.name", "no/such-model"], id="model"),
    pytest.param(
        {"dsso.peft": {"type": "lora", "targets": ["nothing_like_it"]}},
        ["dsso.peft.targets", "nothing_like_it"],
        id="lora-targets",
    ),
    pytest.param({"optimizer.params.exclude": ["."]}, ["the model has no layer for K-FAC"], id="no-layer"),
]


def refused(monkeypatch: Patch, capfd: Capture, out: Path, *arguments: object) -> str:
    """The message of a refusal; checks that nothing was started or written."""
    assert train(monkeypatch, *arguments, "--output_dir", out) == 2
    assert not out.exists()
    assert not torch.distributed.is_initialized()
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    assert told.err.lstrip().startswith("recipe error: ")
    return told.err


@pytest.mark.parametrize(("changes", "words"), RECIPES)
def test_recipes(
    changes: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    told = refused(monkeypatch, capfd, tmp_path / "out", "--ds_config", write_recipe(tmp_path, changes))
    for word in words:
        assert word in told


ROWS = [{"sentence1": "a", "sentence2": "b", "label": n % 2, "idx": n} for n in range(40)]


def write_task(folder: Path, rows: list[dict[str, Any]] | None = None, cut: bool = False) -> Path:
    """Files of the task `rte` in a directory."""
    home = folder / "data" / "rte"
    home.mkdir(parents=True)
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
        (home / f"{split}.jsonl").write_text(text[:-20] if cut else text)
    return folder / "data"


@pytest.mark.parametrize(
    ("rows", "cut", "words"),
    [
        pytest.param([], False, ["train.jsonl", "empty"], id="empty"),
        pytest.param(None, True, ["train.jsonl", "line 40"], id="truncated"),
        pytest.param([{"sentence1": "a", "label": 0}] * 20, False, ["sentence2"], id="column"),
        pytest.param([row | {"label": 7} for row in ROWS], False, ["label", "7"], id="label"),
    ],
)
def test_data(
    rows: Any, cut: bool, words: list[str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    task = {"name": "rte", "data_dir": str(write_task(tmp_path, rows, cut)), "max_length": 48}
    recipe = write_recipe(tmp_path, {"dsso.task": task})
    told = refused(monkeypatch, capfd, tmp_path / "out", "--ds_config", recipe)
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["command line", "--ds_config"], id="no-recipe"),
        pytest.param(["--ds_config", "x.json", "--outputdir", "y"], ["--outputdir", "--help"], id="option"),
        pytest.param(["--ds_config", "no/such.json"], ["no/such.json", "there is no such file"], id="file"),
        pytest.param(
            ["--ds_config", "x.json", "--resume", "auto", "--overwrite"],
            ["give one of the two"],
            id="resume-overwrite",
        ),
    ],
)
def test_command_lines(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    told = refused(monkeypatch, capfd, tmp_path / "out", *arguments)
    for word in words:
        assert word in told


def test_more_command_lines(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    recipe = write_recipe(tmp_path)
    told = refused(
        monkeypatch, capfd, tmp_path / "out", "--ds_config", recipe, "--set", "dsso.train.max_steps"
    )
    assert "--set" in told and "path.to.key=value" in told
    told = refused(
        monkeypatch, capfd, tmp_path / "out", "--ds_config", recipe, "--resume", tmp_path / "nowhere"
    )
    assert "--resume: no checkpoint is there" in told
    recipe.write_text('{"train_batch_size": 8,}')
    told = refused(monkeypatch, capfd, tmp_path / "out", "--ds_config", recipe)
    assert f"{recipe}:1:" in told
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", blocked) == 2
    assert "is a file, not a directory" in capfd.readouterr().err


def test_half_a_launcher_is_refused(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    from launch import train as entry

    monkeypatch.setattr("sys.argv", ["launch/train.py", "--ds_config", str(write_recipe(tmp_path))])
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert entry.main() == 2
    assert "the launcher set RANK but not" in capfd.readouterr().err


def test_check_tells_everything_and_starts_nothing(
    tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, {"dsso.train": {"epochs": 2.0}})
    arguments = (
        "--ds_config",
        recipe,
        "--output_dir",
        out,
        "--set",
        "optimizer.params.damping=0.25",
        "--check",
    )
    assert train(monkeypatch, *arguments) == 0
    told = capfd.readouterr().out
    assert not out.exists()
    assert json.loads(told[told.index("{") : told.index("\n}") + 2])["optimizer"]["params"]["damping"] == 0.25
    assert "KFAC: 20 parameters" in told
    assert "batch        8 = 4 a rank x 2 accumulated x 1 rank(s)" in told
    assert "steps        24" in told
    assert "96 train, 24 validation, 24 test" in told
    assert "nothing was started (--check)" in told
    assert train(monkeypatch, *arguments[:-3], "--set", "optimizer.params.dampin=1", "--check") == 2
    assert "optimizer.params.dampin: unknown key" in capfd.readouterr().err


def test_an_interpreter_without_torch_is_told(command: Command) -> None:
    done = command([sys.executable, "-S", ROOT / "launch/train.py"], env={"PYTHONPATH": ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no package 'torch'\n  remedy: ")
    assert "activate" in done.stderr and "Traceback" not in done.stderr


def test_tracebacks_on_request(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    recipe = write_recipe(tmp_path, {"dsso.task.name": "mrcp"})
    assert train(monkeypatch, "--ds_config", recipe, "--debug") == 2
    assert "Traceback" in capfd.readouterr().err
