"""The script about the memory of methods: the figures that pages quote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing.md"


def test_the_page_quotes_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    assert memory.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = PAGE.read_text(encoding="utf-8")
    for name in memory.ROWS:
        lora, full = found["lora"][name], found["full"][name]
        cells = [
            f"{lora['state_gb']:.3f}",
            f"{lora['wire_mb']:.0f}",
            f"{full['state_gb']:.2f}",
            f"{full['wire_mb'] / 1000:.1f}",
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page
    # The order that the page's advice rests on.
    assert found["lora"]["K-FAC, low_rank 32"]["state_gb"] < 0.05 * found["lora"]["K-FAC"]["state_gb"]


def test_a_method_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", "--only", "nonsense"])
    assert memory.main() == 2
    assert "no such method" in capsys.readouterr().out
