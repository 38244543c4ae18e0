"""Parameter-efficient fine-tuning: what is trained, how it starts, and what comes back from a file."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dsso import tasks
from dsso.config import ModelConfig, TaskConfig
from dsso.errors import RecipeError, RunError
from dsso.tasks import bottleneck
from dsso.tasks.models import MINILM_PACKAGE

ROOT = Path(__file__).resolve().parents[2]
has_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the package with the MiniLM weights is missing"
)
MODELS = ("tiny-t5", "tiny-roberta", "tiny-bert", "tiny-opt", "tiny-llama")
KINDS = {
    "lora": {"type": "lora"},
    "lora all": {"type": "lora", "targets": ["all-linear"], "r": 4},
    "houlsby": {"type": "adapter", "bottleneck": 8},
    "pfeiffer": {"type": "adapter", "bottleneck": 8, "variant": "pfeiffer"},
    "prefix": {"type": "prefix", "num_virtual_tokens": 5},
    "prefix projected": {"type": "prefix", "num_virtual_tokens": 5, "prefix_projection": True},
}
NEW_HEADS = ("classifier", "score", "classification_head")


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(made):
    made.bundle.model.eval()
    batch = made.batch()
    with torch.no_grad():
        return made.ready.logits(made.bundle.model(**batch.inputs), batch)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_only_what_was_added_is_trained_and_all_of_it(make, name, kind):
    made = make({"name": name, "dropout": 0.0}, KINDS[kind])
    model = made.bundle.model.train()
    marks = ("lora_", ".adapter.", "prompt_encoder")
    for parameter in trained(model):
        if not any(mark in parameter for mark in marks):
            assert made.bundle.head == "classification" and any(head in parameter for head in NEW_HEADS), (
                parameter
            )
    batch = made.batch()
    made.ready.loss_sum(model(**batch.inputs), batch).backward()
    assert trained(model) and all(parameter.grad is not None for parameter in trained(model).values())
    # the head is new, so it must learn; a whole backbone must not
    heads = [parameter for parameter in trained(model) if any(head in parameter for head in NEW_HEADS)]
    assert bool(heads) == (made.bundle.head == "classification")
    assert all(trained(model)[head].grad.abs().sum() > 0 for head in heads if "lora_" not in head)


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_model(make, name):
    plain = logits(make({"name": name, "dropout": 0.0}))
    torch.testing.assert_close(logits(make({"name": name}, KINDS["lora"])), plain, rtol=1e-6, atol=1e-6)
    for kind in ("houlsby", "pfeiffer"):
        close = logits(make({"name": name}, KINDS[kind]))
        torch.testing.assert_close(close, plain, rtol=0.0, atol=2e-2)
        assert not torch.equal(close, plain)


@pytest.mark.parametrize(
    ("name", "houlsby", "pfeiffer"),
    # two layers each; a T5 decoder layer has two attention sublayers
    [
        ("tiny-t5", 4 + 6, 4),
        ("tiny-roberta", 4, 2),
        ("tiny-bert", 4, 2),
        ("tiny-opt", 4, 2),
        ("tiny-llama", 4, 2),
    ],
)
def test_places_of_the_adapters(make, name, houlsby, pfeiffer):
    for variant, count in (("houlsby", houlsby), ("pfeiffer", pfeiffer)):
        made = make(name, {"type": "adapter", "bottleneck": 8, "variant": variant})
        found = [m for m in made.bundle.model.modules() if isinstance(m, bottleneck.BottleneckAdapter)]
        assert len(found) == count
        assert all(type(adapter.down) is nn.Linear and type(adapter.up) is nn.Linear for adapter in found)
        assert all((adapter.down.in_features, adapter.down.out_features) == (64, 8) for adapter in found)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_an_adapter_is_its_formula(activation):
    adapter = bottleneck.BottleneckAdapter(6, 3, activation, torch.empty(1))
    hidden = torch.randn(2, 5, 6)
    inner = getattr(nn.functional, activation)(hidden @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(hidden), hidden + inner @ adapter.up.weight.T + adapter.up.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_comes_back(make, name, kind, tmp_path):
    made = make(name, KINDS[kind])
    with torch.no_grad():
        for parameter in trained(made.bundle.model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits(made)
    state = {key: value.detach().clone() for key, value in trained(made.bundle.model).items()}
    with torch.no_grad():
        # only the gathered state may be read: under ZeRO-3 the modules are empty
        for parameter in trained(made.bundle.model).values():
            parameter.zero_()
    tasks.adapters.export(made.bundle, state, tmp_path)
    other = make(name)
    if KINDS[kind]["type"] == "adapter":
        other.bundle.model = tasks.adapters.load(other.bundle.model, tmp_path)
        assert json.loads((tmp_path / "dsso_adapter.json").read_text())["base_model"] == name
    else:
        other.bundle.model = peft.PeftModel.from_pretrained(other.bundle.model, tmp_path)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)


def blocks(page):
    """The Python blocks of a page."""
    return [block.split("```")[0] for block in page.read_text().split("```python\n")[1:]]


def nudged(made):
    """Move what is trained away from its start; returns it by name."""
    with torch.no_grad():
        for parameter in trained(made.bundle.model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return trained(made.bundle.model)


@pytest.mark.parametrize("kind", ["lora", "houlsby", "prefix"])
@pytest.mark.parametrize(
    "name", [pytest.param("minilm", marks=has_minilm), "tiny-bert", "tiny-t5", "tiny-opt head", "directory"]
)
def test_the_readme_of_an_adapter_reads_it_back(make, name, kind, tmp_path):
    task = {"head": "classification"} if name.endswith("head") else {}
    if name == "directory":
        saved = make("tiny-roberta", seed=5)
        saved.bundle.model.save_pretrained(tmp_path / "model")
        saved.bundle.tokenizer.save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model") if name == "directory" else name.split()[0]
    made = make(source, KINDS[kind], seed=3, **task)
    folder = tmp_path / "adapter"
    tasks.adapters.export(made.bundle, nudged(made), folder)
    expected = logits(made)
    found = blocks(folder / "README.md")
    # a class of transformers makes the same base only where this project has not built the model itself
    assert len(found) == (2 if name == "directory" and kind != "houlsby" else 1)
    for text in found:
        scope = {"directory": str(folder)}
        exec(text, scope)
        batch = made.batch()
        with torch.no_grad():
            again = made.ready.logits(scope["model"].eval()(**batch.inputs), batch)[0]
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@has_minilm
def test_the_page_about_tasks_reads_an_adapter_of_minilm_back(make, tmp_path, monkeypatch):
    made = make("minilm", {"type": "lora"})
    tasks.adapters.export(made.bundle, nudged(made), tmp_path / "out" / "adapter")
    monkeypatch.chdir(tmp_path)
    text = next(block for block in blocks(ROOT / "docs" / "tasks.md") if "minilm" in block)
    scope = {}
    exec(text, scope)
    batch = made.batch()
    with torch.no_grad():
        again = made.ready.logits(scope["model"].eval()(**batch.inputs), batch)[0]
    torch.testing.assert_close(again, logits(made), rtol=1e-5, atol=1e-5)


def test_names_of_heads_are_written_once(make, tmp_path):
    made = make("tiny-bert", KINDS["lora"])
    tasks.adapters.export(made.bundle, trained(made.bundle.model), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert "classifier" in written and len(written) == len(set(written))


@pytest.mark.parametrize("kind", [None, "lora", "houlsby"])
def test_permissions_of_an_export_are_those_of_the_umask(make, tmp_path, kind):
    made = make("tiny-bert", KINDS.get(kind))
    before = os.umask(0o027)
    try:
        tasks.adapters.export(made.bundle, trained(made.bundle.model), tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o640}


def test_a_model_that_was_trained_whole_comes_back_by_its_path(make, tmp_path):
    made = make("tiny-t5")
    with torch.no_grad():
        for parameter in made.bundle.model.parameters():
            parameter.mul_(1.1)
    state = dict(made.bundle.model.named_parameters())
    tasks.adapters.export(made.bundle, state, tmp_path)
    torch.testing.assert_close(logits(make(str(tmp_path))), logits(made))


def test_a_parameter_that_was_not_gathered_is_no_export(make, tmp_path):
    made = make("tiny-bert", KINDS["lora"])
    state = trained(made.bundle.model)
    lost = sorted(state)[3]
    del state[lost]
    with pytest.raises(RunError, match="were not gathered") as caught:
        tasks.adapters.export(made.bundle, state, tmp_path)
    assert lost in str(caught.value) and not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_refused(make, tmp_path):
    made = make("tiny-bert", KINDS["houlsby"])
    tasks.adapters.export(made.bundle, trained(made.bundle.model), tmp_path)
    with pytest.raises(RecipeError, match="belongs to another model"):
        tasks.adapters.load(make("tiny-roberta").bundle.model, tmp_path)
    with pytest.raises(RecipeError, match=r"peft\.PeftModel\.from_pretrained"):
        tasks.adapters.load(make("tiny-bert").bundle.model, tmp_path / "nothing")


def refusal(make, name, peft_config, **task):
    with pytest.raises(RecipeError) as caught:
        make(name, peft_config, **task)
    return str(caught.value)


def test_lora_targets_that_match_nothing(make):
    text = refusal(make, "tiny-bert", {"type": "lora", "targets": ["query", "vlaue"]})
    assert "dsso.peft.targets" in text and "got: 'vlaue'" in text and "did you mean 'value'" in text
    assert "all-linear" in text and "key" in text


def test_a_rank_above_the_dimension(make):
    text = refusal(make, "tiny-llama", {"type": "lora", "r": 33, "targets": ["q_proj", "k_proj"]})
    assert "dsso.peft.r" in text and "k_proj" in text and "64 x 32" in text and "1 to 32" in text


def test_a_bottleneck_above_the_width(make):
    text = refusal(make, "tiny-opt", {"type": "adapter", "bottleneck": 65})
    assert "dsso.peft.bottleneck" in text and "1 to 64" in text


def test_a_module_to_save_that_matches_nothing(make):
    text = refusal(make, "tiny-bert", {"type": "lora", "modules_to_save": ["poolr"]})
    assert "dsso.peft.modules_to_save" in text and "nearest: 'pooler'" in text


def test_a_module_to_save_is_trained(make):
    for kind in ({"type": "lora"}, {"type": "adapter", "bottleneck": 8}):
        made = make("tiny-bert", {**kind, "modules_to_save": ["pooler"]})
        assert any("pooler" in name for name in trained(made.bundle.model))


def test_prefixes_that_cannot_work(make):
    prefix = KINDS["prefix"]
    assert "checkpointing" in refusal(
        make, {"name": "tiny-t5", "gradient_checkpointing": "reentrant"}, prefix
    )
    assert "masked LM" in refusal(make, "tiny-roberta", prefix, head="prompt")
    assert "text-to-text" in refusal(make, "tiny-t5", prefix, head="classification")
    assert "the prefix and a new head only" in refusal(
        make, "tiny-bert", {**prefix, "modules_to_save": ["pooler"]}
    )


def test_heads_are_no_targets(make):
    made = make("tiny-roberta", {"type": "lora", "targets": ["dense"]})
    names = [name for name in trained(made.bundle.model) if "lora_A" in name]
    assert len(names) == 6 and not any("classifier" in name for name in names)
    causal = make("tiny-opt", {"type": "lora", "targets": ["all-linear"]})
    assert not any("lm_head" in name for name in trained(causal.bundle.model))


def test_a_model_without_a_place_for_adapters():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(RecipeError, match="no place for bottleneck adapters") as caught:
        bottleneck.insert(model, "houlsby", 4, "gelu")
    assert "GPT2LMHeadModel" in str(caught.value) and "lora" in str(caught.value)
    assert len(tasks.adapters.linear_layers(model)) == 4, "Conv1D layers count as linear"


def test_adapters_are_added_once(make):
    made = make("tiny-bert", KINDS["lora"])
    with pytest.raises(RecipeError, match="has adapters already"):
        tasks.adapters.apply(made.bundle, made.bundle.peft)


def test_none_trains_everything():
    config = TaskConfig(train_examples=4, eval_examples=4)
    task = tasks.load_task(config, 0)
    bundle = tasks.models.load(ModelConfig(name="tiny-bert"), task, config)
    assert all(parameter.requires_grad for parameter in bundle.model.parameters())
