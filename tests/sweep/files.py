"""Sweep files for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.launch.runs import write_recipe

LR = "optimizer.params.lr"
TAU = "optimizer.params.tau"


def write_sweep(folder: Path, changes: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A sweep file over a tiny recipe.

    Args:
        folder: where both are written.
        changes: of the recipe, by dotted path.
        keys: of the sweep file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, {"dsso.engine": "single", "zero_optimization": None, **(changes or {})})
    path = folder / "sweep.json"
    path.write_text(json.dumps({"recipe": "recipe.json", **keys}))
    return path
