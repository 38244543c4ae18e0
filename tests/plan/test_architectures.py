"""Plans of large models from nothing but their configuration, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dsso import tasks
from dsso.curvature import sharing
from dsso.curvature.layers import split_parameters
from dsso.plan import Plan
from dsso.plan.model import survey
from dsso.recipe import load_recipe
from tests.plan.cases import on_meta, planned, recipe

T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 128,
    "num_layers": 24,
    "decoder_start_token_id": 0,
}
# name: (configuration, parameters in billions as published, LoRA targets)
ARCHITECTURES: dict[str, tuple[Any, float, list[str]]] = {
    "t5-3b": (transformers.T5Config(d_ff=16384, num_heads=32, **T5), 2.85, ["q", "v"]),
    "t5-11b": (transformers.T5Config(d_ff=65536, num_heads=128, **T5), 11.3, ["q", "v"]),
    "llama-7b": (
        transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        6.74,
        ["q_proj", "v_proj"],
    ),
    "opt-13b": (
        transformers.OPTConfig(
            vocab_size=50272,
            hidden_size=5120,
            word_embed_proj_dim=5120,
            ffn_dim=20480,
            num_hidden_layers=40,
            num_attention_heads=40,
        ),
        12.85,
        ["q_proj", "v_proj"],
    ),
}


def large(folder: Path, name: str, peft: bool = True, **params: Any) -> dict[str, Any]:
    """A recipe for ZeRO-2 in bf16 whose model is a directory with a configuration and nothing else."""
    config, _, targets = ARCHITECTURES[name]
    config.save_pretrained(folder / name)
    return recipe(
        "zero-2",
        "bf16",
        str(folder / name),
        {"type": "lora", "r": 8, "targets": targets} if peft else None,
        data_types={"grad_accum_dtype": "fp32"},
        zero_optimization={"stage": 2},
        dsso={
            "model": {"name": str(folder / name)},
            "peft": {"type": "lora", "r": 8, "targets": targets} if peft else {"type": "none"},
            "task": {"name": "builtin", "max_length": 256},
            "train": {"epochs": 3.0},
        },
        optimizer={"type": "KFAC", "params": params},
    )


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.timeout(60)
def test_large_models_in_seconds(name: str, peft: bool, tmp_path: Path) -> None:
    found = planned(large(tmp_path, name, peft), 8)
    billions = (found.parameters - found.trained * peft) / 1e9
    assert billions == pytest.approx(ARCHITECTURES[name][1], rel=0.01)
    assert (found.trained == found.parameters) is (not peft)
    assert found.notes == ()
    # Query, key and value have one input; with LoRA on query and value, one of two is kept once.
    assert found.shared >= 32
    # Each rank its share of the factors, and one unit at most: the factors of query, key, value, or of a wide layer.
    most, total = max(rank.factors for rank in found.ranks), sum(rank.factors for rank in found.ranks)
    assert most <= total / 8 + found.largest_unit


def test_t5_3b_lora(tmp_path: Path) -> None:
    exact = planned(large(tmp_path, "t5-3b"), 8, gpu_gb=80)
    assert 1.2e9 < max(rank.factors for rank in exact.ranks) <= 1.4e9
    assert exact.fits
    for rank in (32, 64):
        low = planned(large(tmp_path, "t5-3b", low_rank=rank), 8)
        assert max(one.factors for one in low.ranks) <= 0.25e9


@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_t5_3b_in_full_fits_80_gb(side: int, tmp_path: Path) -> None:
    for overlap in (True, False):
        raw = large(tmp_path, "t5-3b", peft=False, block_side=side, overlap=overlap)
        found = planned(raw, 8, gpu_gb=80)
        assert found.engine == "zero-2" and found.dtype == "bfloat16"
        assert found.trained == found.parameters
        assert found.sent_in_pass is overlap
        assert found.fits


def test_the_first_change_that_fits_does_fit(tmp_path: Path) -> None:
    raw = large(tmp_path, "t5-11b", peft=False)
    found = planned(raw, 8, gpu_gb=80)
    assert found.fits is False
    *tried, remedy = found.remedies
    assert remedy.fits and not any(one.fits for one in tried)
    changed = load_recipe(raw, remedy.overrides)
    again = planned(changed.raw, remedy.world_size, gpu_gb=80)
    assert again.fits and again.worst.peak == remedy.peak
    assert [row.name for row in found.strategies] == [
        "communication_optimal",
        "hybrid_optimal",
        "memory_optimal",
    ]
    assert [row.factors for row in found.strategies] == sorted(
        (r.factors for r in found.strategies), reverse=True
    )
    json.dumps(found.to_json())


def test_statistics_are_largest_at_first(tmp_path: Path) -> None:
    found = planned(large(tmp_path, "llama-7b", factor_interval=[[0, 1], [20, 10]], overlap=False), 8)
    whole = sum(rank.factors for rank in found.ranks)
    assert found.all_until == 20
    for rank in found.ranks:
        # Every rank sums every factor, whoever owns it.
        assert rank.statistics >= 0.99 * whole
        assert rank.statistics_later < 0.2 * rank.statistics
        # One after another: no more than one is made at a time, however many are due.
        assert rank.refresh_later == rank.refresh == 2 * 4 * 4096**2
    waiting = planned(large(tmp_path, "llama-7b", async_delay=2, overlap=False), 8)
    for rank in waiting.ranks:
        assert rank.refresh > 0.9 * rank.factors
        assert rank.refresh_later < rank.refresh
    together = planned(large(tmp_path, "llama-7b", stagger=False, overlap=False), 8)
    assert together.all_until is None
    assert together.worst.statistics_later == together.worst.statistics


MODELS = ["tiny-t5", "tiny-opt", "tiny-llama", "tiny-roberta", "tiny-bert"]
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"type": "none"},
    "lora": {"type": "lora", "r": 4},
    "adapter": {"type": "adapter", "bottleneck": 8},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("model", MODELS)
def test_common_inputs_are_found_without_weights(model: str, tuning: str, dtype: str) -> None:
    written = load_recipe(recipe("ddp", dtype, model, TUNINGS[tuning]))
    config, kind = written.dsso, written.precision.torch_dtype
    task = tasks.load_task(config.task, 0)
    bundle = tasks.adapters.apply(tasks.models.load(config.model, task, config.task, kind), config.peft)
    real = bundle.model.to(kind)
    layers = split_parameters(real).layers
    leaders = sharing.leaders(real, layers, sharing.example_inputs(real))
    wanted = [f"{layers[leader].name}/a" for leader in leaders]
    empty = on_meta(written)
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = survey(empty, written.optimizer_config)
    assert [layer.a_key for layer in found.layers] == wanted
    assert {w.name: w.shape for w in found.weights} == {n: tuple(p.shape) for n, p in real.named_parameters()}
    assert [w.trained for w in found.weights] == [p.requires_grad for p in real.parameters()]


def test_operations_of_a_plain_network() -> None:
    """One frozen and one trained layer of 8 x 8: 2 products forward, 2 for inputs, 1 for the weight."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)
            self.first.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    from dsso.plan import plan

    written = load_recipe(recipe("ddp", params={"share_inputs": "off"}))
    found: Plan = plan(Net(), written, 2)
    tokens = 4 * 96
    assert found.operations.training == 5 * 2 * 64 * tokens
    # Two factors of side 8: a half of each product, with the diagonal.
    assert found.operations.measure == 2 * 2 * tokens * 36
    assert found.operations.refresh == pytest.approx(2 * 2 * 8**3 / 3)
    assert found.operations.apply == 2 * (2 * 64 * 8)
    assert found.factors == 2 and found.parameters == 136 and found.trained == 64
