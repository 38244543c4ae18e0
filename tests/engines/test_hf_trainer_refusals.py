"""What dsso refuses of a Hugging Face Trainer, in words that say what to do; the scale of its losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import dsso
from dsso.engines.hf_loss import TrainerLoss
from dsso.engines.hf_recipe import from_deepspeed
from dsso.errors import RecipeError, RunError
from tests.engines import hf_worker

KFAC: dict[str, Any] = {"optimizer": {"type": "KFAC", "params": {"lr": "auto"}}}
MEZO: dict[str, Any] = {"optimizer": {"type": "MeZO", "params": {"lr": "auto"}}}


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    hf_worker.forget()
    yield
    hf_worker.forget()


def model_of() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))


def examples(count: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 50, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    plain: dict[str, Any] = {
        "learning_rate": 0.1,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "report_to": [],
    }
    own = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder / "out"), **plain | own | more)


def trainer_of(folder: Path, kind: Any = Trainer, given: dict[str, Any] | None = None, **more: Any) -> Any:
    return kind(model_of(), arguments(folder, **more), train_dataset=examples(), **(given or {}))


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "dsso.attach: without DeepSpeed the optimizer has to be given"),
        ({"optimiser": {}}, "nearest: 'optimizer'"),
        ({"zero_optimization": {"stage": 2}, **KFAC}, "TrainingArguments(deepspeed=…)"),
        ({"optimizer": {"type": "KFACC"}}, "write 'KFAC'"),
        ({"optimizer": {"type": "AdamW"}}, "the Trainer has without dsso"),
        ({"optimizer": {"type": "KFAC", "parms": {}}}, "nearest: 'params'"),
        ({"optimizer": {"type": "KFAC", "params": {"dampin": 1.0}}}, "nearest: 'damping'"),
        ({"optimizer": {"type": "KFAC", "params": []}}, "optimizer.params: must be an object"),
        (
            {"optimizer": {"type": "KFAC", "params": {"lr": 0.2}}},
            "contradicts TrainingArguments.learning_rate",
        ),
        ({"optimizer": {"type": "KFAC", "params": {"fisher": "sampled"}}}, "optimizer.params.fisher"),
        ({"optimizer": {"type": "Sophia"}}, "takes windows of estimation"),
        ({"optimizer": {"type": "MeZO"}}, "dsso.ForwardTrainer"),
    ],
)
def test_a_recipe_that_cannot_be_used(tmp_path: Path, config: Any, words: str) -> None:
    trainer = trainer_of(tmp_path)
    assert words in refused(lambda: dsso.attach(trainer, config))
    # Nothing was changed: the Trainer trains as it would have.
    trainer.train()


def test_a_file_that_is_not_there_or_no_recipe(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    (tmp_path / "kfac.json").write_text("{")
    assert "kfac.json?" in refused(lambda: dsso.attach(trainer, str(tmp_path / "kfak.json")))
    assert "is not JSON" in refused(lambda: dsso.attach(trainer, tmp_path / "kfac.json"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_grad_norm": 0.5}, "optimizer.params.tau = 0.5"),
        ({"optim": "sgd"}, "TrainingArguments.optim"),
        ({"auto_find_batch_size": True}, "TrainingArguments.auto_find_batch_size"),
        ({"torch_compile": True}, "TrainingArguments.torch_compile"),
    ],
)
def test_arguments_that_do_not_work(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    trainer = trainer_of(tmp_path, **more)
    assert words in refused(lambda: dsso.attach(trainer, KFAC))


@pytest.mark.parametrize(
    ("more", "config", "words"),
    [
        ({"gradient_checkpointing": True}, MEZO, "there is no backward pass"),
        ({"bf16": True}, MEZO, "TrainingArguments.bf16"),
        ({"max_grad_norm": 0.5}, MEZO, "max_slope"),
        ({"optim": "sgd"}, MEZO, "the method is given as optimizer"),
        ({}, KFAC, "dsso.attach(trainer, recipe)"),
        ({}, {"optimizer": {"type": "MeZO", "params": {"epz": 1e-3}}}, "nearest: 'eps'"),
    ],
)
def test_what_methods_from_losses_do_not_do(tmp_path: Path, more: Any, config: Any, words: str) -> None:
    given = {"optimizer": config}
    assert words in refused(lambda: trainer_of(tmp_path, dsso.ForwardTrainer, given, **more))


def test_another_optimizer_is_there_or_dsso_is_there(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    assert "Trainer.optimizer" in refused(lambda: dsso.attach(trainer, KFAC))
    trainer.optimizer = None
    dsso.attach(trainer, KFAC)
    with pytest.raises(RunError, match="attached to this Trainer already"):
        dsso.attach(trainer, KFAC)


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto", **KFAC}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_cliping": 1.0}, "write 'gradient_clipping'"),
        ({"gradient_clipping": 1.0}, "optimizer.params.clip"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"optimizer": {"type": "KFAC", "params": {"damping": "auto"}}}, "optimizer.params.damping"),
        ({"scheduler": {"type": "WarmupLr"}}, "write 'WarmupLR'"),
        ({"optimizer": None}, "optimizer"),
    ],
)
def test_a_deepspeed_configuration_that_cannot_be_used(tmp_path: Path, change: Any, words: str) -> None:
    written = {**ZERO, **change}
    assert words in refused(lambda: from_deepspeed(arguments(tmp_path), written, dict(written)))


def test_auto_of_the_trainer_works_in_a_deepspeed_configuration(tmp_path: Path) -> None:
    written = {**ZERO, "gradient_clipping": "auto", "scheduler": {"type": "WarmupDecayLR", "params": {}}}
    written["zero_optimization"] = {"stage": 3, "reduce_bucket_size": "auto"}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(written))
    filled = json.loads(json.dumps(written)) | {"gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    filled["optimizer"]["params"]["lr"] = 0.1
    args = arguments(tmp_path)
    asked = from_deepspeed(args, str(path), filled)
    assert (asked.kind, asked.config.lr) == ("KFAC", 0.1)  # type: ignore[attr-defined]
    assert "optimizer" not in filled
    assert filled["gradient_clipping"] == args.max_grad_norm == 0.0
    assert any("max_grad_norm" in note for note in asked.notes)


@pytest.mark.parametrize("looks", [True, False])
def test_the_scale_of_a_loss(looks: bool) -> None:
    """One that divides by the number that it is given, and one that takes its own mean."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ranks, items = 2, torch.tensor(10.0)

    def compute(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        terms = values[inputs["labels"] != -100]
        mean = terms.sum() / num_items_in_batch if looks else terms.mean()
        return (mean * ranks, None) if return_outputs else mean * ranks

    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        args=SimpleNamespace(average_tokens_across_devices=True),
        accelerator=SimpleNamespace(num_processes=ranks),
        current_gradient_accumulation_steps=2,
        _loss_shifts_labels=False,
    )
    inputs = {"labels": torch.tensor([0, -100, 1, 2])}
    found = TrainerLoss(trainer, compute)
    assert found.of(None, inputs, num_items_in_batch=items) == pytest.approx(ranks * 8.0 / 10.0)
    assert found.of(None, inputs, True, items)[0] == pytest.approx(ranks * 8.0 / 10.0)
    assert found.terms == 3
    assert found.scale == pytest.approx(10.0 / ranks)  # times it, the loss is the sum of its terms
    total, terms = found.total(None, inputs)
    assert (float(total), int(terms)) == (pytest.approx(8.0), 3)
    with pytest.raises(RunError, match="has no labels"):
        found.of(None, {"input_ids": inputs["labels"]}, num_items_in_batch=items)


def test_bad_batches_are_dropped_and_told(tmp_path: Path) -> None:
    class Bad(Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    trainer = trainer_of(tmp_path, Bad, max_steps=3)
    dsso.attach(trainer, KFAC)
    with pytest.warns(UserWarning, match=r"1 step\(s\) were skipped on all ranks"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0.0, 1.0, 1.0]
    assert trainer.dsso.engine.table()[0]["parameter"] == next(iter(dict(trainer.model.named_parameters())))
