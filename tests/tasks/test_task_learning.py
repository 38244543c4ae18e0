"""The generated task can be learnt: a little by a tiny model, well by a pretrained one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dsso import tasks
from dsso.tasks.models import MINILM_PACKAGE


def train(made, steps, lr):
    """AdamW with a short warm-up and a linear decay; returns the validation accuracy."""
    model, ready = made.bundle.model, made.ready
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        indices = tasks.data.global_batch(len(ready.train), 32, 0, step)
        batch = ready.collate([ready.train[index] for index in indices], indices)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        (ready.loss_sum(model(**batch.inputs), batch) / batch.terms).backward()
        optimizer.step()
    return ready.evaluate(model, "validation", 64)["accuracy"]


def test_a_tiny_model_finds_the_hints(make):
    made = make({"name": "tiny-bert", "dropout": 0.0}, train_examples=None, eval_examples=300)
    assert train(made, 100, 1e-3) > made.ready.majority_baseline["accuracy"] + 0.05


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the package with the MiniLM weights is missing"
)
def test_minilm_compares_the_sentences(make):
    lora = {"type": "lora", "targets": ["query", "key", "value", "dense"]}
    made = make("minilm", lora, train_examples=None, eval_examples=300, max_length=64)
    assert train(made, 120, 2e-3) > made.ready.majority_baseline["accuracy"] + 0.15
