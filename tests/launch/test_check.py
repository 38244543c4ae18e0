"""`--check` plans: for other numbers of ranks, for models without weights and tasks without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.launch.runs import train, write_recipe

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def check(monkeypatch: Patch, capfd: Capture, recipe: Path, *more: object) -> str:
    """What `--check` prints."""
    assert (
        train(monkeypatch, "--ds_config", recipe, "--output_dir", recipe.parent / "out", "--check", *more)
        == 0
    )
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
    tight = check(monkeypatch, capfd, recipe, "--world_size", 4, "--gpu_memory", 0.001)
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
