"""Methods without gradients through the one entry: trained, resumed, on replicas, refused where they cannot run yet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dsso.optim import resolve
from tests.launch.runs import ROOT, lines, summary, train

CONFIGS = ROOT / "configs"
SINGLE, REPLICAS = CONFIGS / "mezo_tiny_roberta_full_single.json", CONFIGS / "mezo_tiny_t5_lora_ddp.json"
Command = Callable[..., Any]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / "step_00000008" / "dsso").glob("partition_rank*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def test_a_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(monkeypatch, "--ds_config", SINGLE, "--output_dir", whole) == 0
    assert all(line["slope"] > 0 and line["forwards"] == 4 for line in lines(whole))
    assert summary(whole)["optimizer"] == "MEZO"
    half = ["--ds_config", SINGLE, "--output_dir", parts, "--set", "dsso.train.max_steps=4"]
    assert train(monkeypatch, *half) == 0
    assert train(monkeypatch, "--ds_config", SINGLE, "--output_dir", parts, "--resume", "auto") == 0
    mine, theirs = weights(parts), weights(whole)
    assert theirs
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("recipe", "forwards"),
    [
        ("zo_adam_tiny_roberta_full_single", [4] * 8),
        ("zo_adamm_tiny_t5_lora_ddp", [4] * 8),
        ("zo_adamu_tiny_roberta_full_bf16_single", [2] * 8),
        ("hizoo_tiny_t5_lora_ddp", [3] * 4 + [5] * 4),
    ],
)
def test_methods_with_state_go_on_with_it(
    recipe: str, forwards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, parts = ["--ds_config", CONFIGS / f"{recipe}.json"], tmp_path / "parts"
    assert train(monkeypatch, *given, "--output_dir", tmp_path / "whole") == 0
    told = lines(tmp_path / "whole")
    assert [line["forwards"] for line in told] == forwards
    assert all(line["slope"] > 0 and line["skipped_steps"] == 0 for line in told)
    half = ["--output_dir", parts, "--set", "dsso.train.max_steps=4"]
    assert train(monkeypatch, *given, *half) == 0
    assert train(monkeypatch, *given, "--output_dir", parts, "--resume", "auto") == 0
    mine, theirs = weights(parts), weights(tmp_path / "whole")
    kinds = {name.partition("/")[0] for name in theirs}
    assert kinds == {"weight", *resolve(summary(parts)["optimizer"]).Method.states}
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.dist
def test_two_replicas_take_the_steps_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    assert train(monkeypatch, "--ds_config", REPLICAS, "--output_dir", tmp_path / "one") == 0
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch" / "train.py"]
    done = command([*head, "--ds_config", REPLICAS, "--output_dir", tmp_path / "two"])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["forwards"] for line in two] == [2] * 4 + [4] * 4
    assert len(one) == len(two) == 8
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_where_it_does_not_work_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ds_config", SINGLE, "--output_dir", tmp_path / "out", "--check"]
    assert train(monkeypatch, *words) == 2
    assert "no plan can be made for this method" in capsys.readouterr().err
    assert train(monkeypatch, *words[:4], "--set", "optimizer.params.eps=0") == 2
    assert "optimizer.params.eps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
def test_sharded_weights_are_refused_before_anything_starts(tmp_path: Path, command: Command) -> None:
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch" / "train.py"]
    more = ["--ds_config", REPLICAS, "--output_dir", tmp_path / "out", "--set", "dsso.engine=fsdp2"]
    done = command([*head, *more])
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "MEZO needs all weights on every rank in this version" in told
    assert "set dsso.engine to 'ddp'" in told
    assert "parameter " not in told  # the table that a started run shows
    assert not (tmp_path / "out").exists()
