"""What the README and the manual tell people to type exists."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest

from dsso.recipe import load_recipe
from tests.house.files import ROOT, project_files, short

PAGES = [path for path in project_files() if path.suffix == ".md"]
_BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(
    r"(?<![\w/$<.-])((?:launch|configs|tests|docs|dsso)/[\w./-]*\.(?:sh|py|json|md|sbatch|txt))\b"
)
_MODULE = re.compile(r"python3? -m (dsso[\w.]*)")
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


def commands(text: str) -> str:
    """Everything inside shell blocks."""
    return "\n".join(_BLOCK.findall(text))


def test_the_readme_names_both_commands() -> None:
    typed = commands((ROOT / "README.md").read_text())
    assert "bash launch/quickstart.sh" in typed
    assert "bash launch/test.sh" in typed


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in _FILE.findall(commands(text)) if not (ROOT / name).exists()]
    for module in _MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(module)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_json_blocks_parse(page: Path) -> None:
    for block in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        # members may be shown without the object around them
        json.loads(block if block.lstrip().startswith(("{", "[")) else f"{{{block}}}")


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_whole_recipes_are_accepted(page: Path) -> None:
    for block in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if block.startswith("{") and '"dsso"' in block:
            assert load_recipe(json.loads(block)).resolved(2, steps=100).global_batch > 0


def test_torch_is_pinned_exactly() -> None:
    pins = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert len(pins) == 1


def test_every_extra_can_be_checked() -> None:
    """What tests and documentation import is in the extra that the scripts install."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = {name: value.split() for name, value in parser["options.extras_require"].items()}
    names = {name: {re.split(r"[<>=]", one)[0] for one in value} for name, value in extras.items()}
    for extra in ("metrics", "tensorboard", "plots", "docs"):
        assert names[extra] <= names["dev"], f"the extra dev lacks a package of {extra}"
