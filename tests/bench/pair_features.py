"""Sentence pairs as fixed features of MiniLM, and the small network that learns from them.

A pair with mean-pooled sentence vectors u and v becomes |u - v|, 384 numbers, each standardized by the training
examples. The network has two hidden layers, 128 and 32 units, GELU. Labels of a regression are standardized as well, so
that the constant prediction has loss 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dsso import tasks
from dsso.recipe import load_recipe
from dsso.tasks.base import Example

HIDDEN = (128, 32)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pairs:
    """A task: of each split the features `[N, F]` and the labels `[N]`, whole numbers for classes."""

    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    classes: int
    """1: a regression."""

    def loss(self, out_NC: Tensor, label_N: Tensor) -> Tensor:
        """Mean over the examples: cross-entropy in nats, or squared error in label variances."""
        return F.mse_loss(out_NC[:, 0], label_N) if self.classes == 1 else F.cross_entropy(out_NC, label_N)

    def score(self, out_NC: Tensor, label_N: Tensor) -> float:
        """Accuracy, or Pearson's correlation; 0 for a constant prediction."""
        if self.classes == 1:
            found = float(torch.corrcoef(torch.stack([out_NC[:, 0], label_N]))[0, 1])
            return found if found == found else 0.0
        return float((out_NC.argmax(1) == label_N).double().mean())

    def network(self, seed: int) -> nn.Sequential:
        """With fresh weights."""
        torch.manual_seed(seed)
        widths = [self.features["train"].shape[1], *HIDDEN]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))


def load(task: str, model: str, cache: Path, limit: int | None = None) -> Pairs:
    """Features of a task, computed once and kept in the folder `cache`.

    Args:
        task: of two texts, as a recipe names it.
        model: encoder, as a recipe names it.
        cache: folder.
        limit: examples of each split; None: all.
    """
    file = cache / f"{task}_{model}_{limit}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_embedded(task, model, limit), file)
    kept = torch.load(file, weights_only=True)
    return Pairs(kept["features"], kept["labels"], kept["classes"])


def _embedded(name: str, model: str, limit: int | None) -> dict[str, object]:
    root = Path(__file__).resolve().parents[2]
    written = root / "configs" / "kfac_minilm_mrpc_lora.json"
    recipe = load_recipe(written, [f"dsso.task.name={name}", f"dsso.model.name={model}"])
    task = tasks.load_task(recipe.dsso.task, 0)
    bundle = tasks.models.load(recipe.dsso.model, task, recipe.dsso.task)
    encoder = bundle.model.base_model.eval()
    splits = {split: list(task.split(split))[:limit] for split in SPLITS}
    raw = {
        split: _features(examples, task.spec.fields, bundle.tokenizer, encoder)
        for split, examples in splits.items()
    }
    centre, spread = raw["train"].mean(0), raw["train"].std(0).clamp_min(1e-6)
    classes = task.num_labels
    labels = {
        split: torch.tensor([example.label for example in examples], dtype=torch.float32)
        for split, examples in splits.items()
    }
    if classes == 1:
        mean, deviation = labels["train"].mean(), labels["train"].std()
        labels = {split: (label_N - mean) / deviation for split, label_N in labels.items()}
    else:
        labels = {split: label_N.long() for split, label_N in labels.items()}
    return {
        "features": {split: (x_NF - centre) / spread for split, x_NF in raw.items()},
        "labels": labels,
        "classes": classes,
    }


@torch.no_grad()
def _features(
    examples: list[Example], fields: tuple[str, ...], tokenizer: object, encoder: nn.Module
) -> Tensor:
    first, second = (_pooled([e.texts[name] for e in examples], tokenizer, encoder) for name in fields)
    return (first - second).abs()


def _pooled(texts: list[str], tokenizer: object, encoder: nn.Module) -> Tensor:
    rows = []
    for at in range(0, len(texts), 64):
        batch = tokenizer(
            texts[at : at + 64], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )  # type: ignore[operator]
        hidden_BTI = encoder(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((hidden_BTI * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1))
    return torch.cat(rows)
