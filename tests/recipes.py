"""Small recipes for tests, and changes to them by dotted path."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dsso.errors import RecipeError
from dsso.recipe import Recipe, load_recipe

BASE: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "KFAC", "params": {"lr": 0.05}},
    "zero_optimization": {"stage": 1},
    "dsso": {"train": {"max_steps": 100}},
}
ADAMW: dict[str, Any] = {**BASE, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with values set, or removed (`...`), by dotted path."""
    raw = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        home = raw
        for part in parents:
            home = home.setdefault(part, {})
        if value is ...:
            del home[last]
        else:
            home[last] = value
    return raw


def load(changes: dict[str, Any], base: dict[str, Any] = BASE) -> Recipe:
    return load_recipe(changed(base, changes))


def message(changes: dict[str, Any], base: dict[str, Any] = BASE, ranks: int | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe = load(changes, base)
        if ranks is not None:
            recipe.resolved(ranks)
    assert caught.value.exit_status == 2
    return str(caught.value)
