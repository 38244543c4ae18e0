"""What has to be written about a method."""

from __future__ import annotations

import json
import re

from tests.house.files import ROOT


def check(kind: str) -> None:
    """A page with formulas, costs, deviations and sources, which the index has; and a recipe."""
    name = kind.lower()
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file()
    text = page.read_text()
    assert "$$" in text, "its formulas"
    assert "\n## What it costs\n" in text
    assert re.search(r"^## (Deviations|What had to be interpreted)", text, re.M)
    assert re.search(r"^(## Sources|Sources?:)", text, re.M)
    assert f"methods/{name}\n" in (ROOT / "docs" / "index.md").read_text()
    types = [
        json.loads(file.read_text())["optimizer"]["type"].upper() for file in ROOT.glob("configs/*.json")
    ]
    assert kind in types
