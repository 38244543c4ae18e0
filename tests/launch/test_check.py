"""`--check` plans: for other numbers of ranks, for models without weights and tasks without data."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from dsso.tasks import hub
from tests.conftest import Command
from tests.launch.runs import ROOT, train, write_recipe

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def check(monkeypatch: Patch, capfd: Capture, recipe: Path, *more: object, expected: int = 0) -> str:
    """What `--check` prints; its status says whether the run fits."""
    status = train(
        monkeypatch, "--ds_config", recipe, "--output_dir", recipe.parent / "out", "--check", *more
    )
    assert status == expected
    assert not (recipe.parent / "out").exists()
    return capfd.readouterr().out


def test_a_plan_for_other_ranks(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    recipe = write_recipe(tmp_path, {"zero_optimization.reduce_bucket_size": 1000})
    alone = check(monkeypatch, capfd, recipe)
    assert "KFAC, one device, float32, 1 rank(s)" in alone
    several = check(monkeypatch, capfd, recipe, "--world_size", 4, "--gpu_memory", 1)
    assert "KFAC, DeepSpeed ZeRO 1, float32, 4 rank(s)" in several
    assert "batch        32 = 4 a rank x 2 accumulated x 4 rank(s)" in several
    assert "fits         1.00 GB" in several
    tight = check(monkeypatch, capfd, recipe, "--world_size", 4, "--gpu_memory", 0.001, expected=1)
    assert "does not fit 1.00 MB" in tight
    assert "planned" in tight[tight.index("does not fit 1.00 MB") :]


@pytest.mark.parametrize("head", ["prompt", "classification"])
def test_neither_weights_nor_tokenizer_nor_data(
    head: str, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path / "model")
    task = {"name": "rte", "data_dir": str(tmp_path / "nowhere"), "head": head}
    changes = {
        "dsso.model.name": str(tmp_path / "model"),
        "dsso.peft": {"type": "lora", "r": 4},
        "dsso.task": task,
        "dsso.train": {"epochs": 2.0},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"},
        },
    }
    recipe = write_recipe(tmp_path, changes)
    told = check(monkeypatch, capfd, recipe, "--world_size", 2)
    assert "data         not here: dsso.task.data_dir: the data directory does not exist" in told
    assert "steps        not known" in told
    assert "Kronecker factors" in told
    # A run needs all three.
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "out") == 2
    assert "the data directory does not exist" in capfd.readouterr().err


def test_what_is_wrong_stays_wrong(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    def refused(recipe: Path, *more: object) -> str:
        assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "out", *more) == 2
        return capfd.readouterr().err

    good = write_recipe(tmp_path)
    assert "--world_size is for planning" in refused(good, "--world_size", 2)
    assert "--gpu_memory must be above 0" in refused(good, "--check", "--gpu_memory", 0)
    batch = write_recipe(tmp_path, {"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"})
    assert "train_batch_size" in refused(batch, "--check", "--world_size", 3)
    for changes, word in (
        ({"dsso.task.name": "mrcp"}, "there is no such task"),
        ({"dsso.model.name": "no/such-model"}, "the model cannot be loaded"),
        ({"dsso.peft": {"type": "lora", "r": 1000}}, "the rank is larger"),
        ({"dsso.peft": {"type": "lora", "targets": ["nothing_like_it"]}}, "matches no linear layer"),
        ({"optimizer.params.exclude": ["."]}, "the model has no layer for K-FAC"),
        ({"dsso.task.max_length": 5000}, "the model reads at most"),
    ):
        assert word in refused(write_recipe(tmp_path, changes), "--check", "--world_size", 2)


@pytest.fixture
def nowhere(monkeypatch: Patch) -> Iterator[dict[str, str]]:
    """Environment of a machine that cannot resolve the hub's name."""
    env = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DSSO_DATA"), "")
    env |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")
    env["HF_ENDPOINT"] = "https://hub.invalid"
    for name in env:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", env["HF_ENDPOINT"])
    hub.unreachable.cache_clear()
    yield env
    hub.unreachable.cache_clear()


def test_without_a_network_only_the_cache_is_looked_at(
    nowhere: dict[str, str], tmp_path: Path, command: Command
) -> None:
    nowhere["HF_HOME"] = str(tmp_path / "cache")
    words = [
        sys.executable,
        ROOT / "launch/train.py",
        "--output_dir",
        tmp_path / "out",
        "--check",
        "--ds_config",
    ]
    data = command([*words, write_recipe(tmp_path, {"dsso.task.name": "rte"})], env=nowhere)
    assert data.returncode == 0, data.stderr
    told = next(line for line in data.stdout.splitlines() if line.startswith("data "))
    assert "not here" in told and "hub.invalid cannot be resolved, so only the cache was looked at" in told
    changes = {"dsso.model.name": "some/model", "dsso.task.name": "rte"}
    model = command([*words, write_recipe(tmp_path, changes)], env=nowhere)
    assert model.returncode == 2
    assert model.stderr.count("hub.invalid cannot be resolved") == 1
    assert "for --check one with nothing but the model's config.json is enough" in model.stderr
    assert "Retry" not in data.stderr + model.stderr


def test_when_the_hub_is_taken_for_unreachable(nowhere: dict[str, str], monkeypatch: Patch) -> None:
    asked: list[Any] = []

    def resolve(host: str, port: object, *more: object, known: bool = False) -> list[Any]:
        asked.append(host)
        if not known:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert hub.unreachable() == "hub.invalid" and hub.unreachable() == "hub.invalid"
    assert asked == ["hub.invalid"], "asked once"
    for name, value in (("HF_HUB_OFFLINE", "0"), ("https_proxy", "http://a:1"), ("ALL_PROXY", "http://a:1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            hub.unreachable.cache_clear()
            assert hub.unreachable() is None
    assert len(asked) == 1, "what the user has said is not asked"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **o: resolve(*a, known=True))
    hub.unreachable.cache_clear()
    assert hub.unreachable() is None and hub.words() == ""


def test_nothing_is_asked_for_what_is_built_in(
    nowhere: dict[str, str], tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    monkeypatch.setattr(hub, "prefer_cache", lambda: pytest.fail("the hub was thought of"))
    check(monkeypatch, capfd, write_recipe(tmp_path))
