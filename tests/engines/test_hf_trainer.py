"""dsso in a Hugging Face Trainer, one process: the steps of `launch/train.py`, checkpoints, adapters, logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import dsso
from tests.engines import hf_worker
from tests.engines.hf_worker import STEPS, Run
from tests.engines.test_hf_trainer_refusals import arguments, examples, model_of

ALONE = {"zero_optimization": None, "dsso.engine": "single"}
MEZO = {**ALONE, "optimizer": {"type": "MeZO", "params": {"lr": 1e-3, "eps": 0.05}}}


def pieces(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and moments in dsso's part of a checkpoint, put together."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in (checkpoint / "dsso").glob("partition_rank*.safetensors"):
        for key, tensor in safetensors.torch.load_file(file).items():
            name, _, start = key.rpartition("@")
            parts.setdefault(name, []).append((int(start), tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(found, key=lambda one: one[0])])
        for name, found in parts.items()
    }


def apart(mine: Path, theirs: Path) -> float:
    """Largest difference of any weight or moment, over the largest of its kind of that parameter."""
    ours, others = pieces(mine), pieces(theirs)
    assert ours.keys() == others.keys()
    assert any(name.startswith("weight/") for name in ours)
    return max(
        float((ours[n] - others[n]).abs().max() / others[n].abs().max().clamp_min(1e-12)) for n in ours
    )


def launched(out: Path, name: str, step: int = STEPS) -> Path:
    return out / name / "checkpoints" / f"step_{step:08d}"


def trained(out: Path, name: str, step: int = STEPS) -> Path:
    return out / name / f"checkpoint-{step}"


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Trainer's accelerator, and the variables that it sets, are those of one test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    hf_worker.forget()
    yield
    hf_worker.forget()


def test_one_process_equals_launch(tmp_path: Path) -> None:
    hf_worker.through_launch(Run("launch", ALONE), tmp_path)
    hf_worker.through_trainer(Run("trainer", ALONE, how="plain"), tmp_path, 1)
    assert apart(trained(tmp_path, "trainer"), launched(tmp_path, "launch")) < 1e-5
    hf_worker.through_trainer(Run("parts", ALONE, how="plain", resume="trainer"), tmp_path, 1)
    assert apart(trained(tmp_path, "parts"), trained(tmp_path, "trainer")) == 0


def test_a_method_from_losses_goes_on_exactly(tmp_path: Path) -> None:
    hf_worker.through_trainer(Run("trainer", MEZO, how="forward"), tmp_path, 1)
    hf_worker.through_trainer(Run("parts", MEZO, how="forward", resume="trainer"), tmp_path, 1)
    assert apart(trained(tmp_path, "parts"), trained(tmp_path, "trainer")) == 0


def _adapted(folder: Path, **more: Any) -> Any:
    """A Trainer of a small model with LoRA adapters that evaluates and keeps the best."""
    own = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    model = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["query", "value"]))
    given = {"train_dataset": examples(), "eval_dataset": examples(8)}
    return Trainer(model, arguments(folder, **own, **best, max_steps=3, **more), **given)


def test_the_best_model_and_adapters_in_checkpoints(tmp_path: Path) -> None:
    trainer = _adapted(tmp_path)
    dsso.attach(trainer, {"optimizer": {"type": "KFAC", "params": {"lr": "auto"}}})
    trainer.train()
    # The worst loss counts as the best here, so that it is not the last weights that are kept.
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    trainable = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    read = PeftModel.from_pretrained(model_of(), best)
    found = {n: p for n, p in read.named_parameters() if n in trainable}
    assert found.keys() == trainable.keys()
    assert any(bool(p.any()) for n, p in trainable.items() if "lora_B" in n)
    assert all(torch.equal(found[name], value) for name, value in trainable.items())


def test_a_second_training_goes_on_with_the_optimizer(tmp_path: Path) -> None:
    trainer = Trainer(model_of(), arguments(tmp_path), train_dataset=examples())
    attached = dsso.attach(trainer, {"optimizer": {"type": "SHAMPOO", "params": {"lr": "auto"}}})
    trainer.train()
    assert attached.engine is not None
    engine, before = attached.engine, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert attached.engine is engine
    assert engine.optimizer.steps == engine.global_steps == 4
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_causal_models_count_the_terms_that_they_predict(tmp_path: Path) -> None:
    """The loss that is logged is the mean over all terms of the window, however they are spread."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    rows = []
    for length in range(2, 10):
        ids = torch.randint(3, 30, (9,), generator=torch.Generator().manual_seed(length))
        mask = (torch.arange(9) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = Trainer(model, arguments(tmp_path, **more), train_dataset=rows)
    dsso.attach(trainer, {"optimizer": {"type": "KFAC", "params": {"lr": "auto"}}})
    batch = torch.utils.data.default_collate(rows)
    with torch.no_grad():
        whole = model.eval()(**batch).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole, rel=1e-5)
