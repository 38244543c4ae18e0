"""The README's own recipe and commands, typed as they stand there."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsso.recipe import load_recipe
from tests.launch.runs import ROOT, lines

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = re.findall(r"```json\n(.*?)```", TEXT, re.S)[0]
COMMANDS = [
    line.partition("#")[0].split()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if "launch/train.py" in line
]


def test_the_recipe_is_one() -> None:
    assert load_recipe(json.loads(RECIPE)).resolved(2).is_method
    assert len(COMMANDS) == 4


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_the_commands(tmp_path: Path, command: Callable[..., Any]) -> None:
    """In an empty folder that has nothing but the recipe and what a checkout has."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipe.json").write_text(RECIPE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for words in COMMANDS:
        done = command(words, timeout=600, env={"PATH": path, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert lines(tmp_path / "runs" / "first")[-1]["step"] == 80
    assert lines(tmp_path / "runs" / "alone")[-1]["step"] == 60
