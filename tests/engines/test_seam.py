"""The DeepSpeed seam on two ranks: bad batches, fp16 overflow, checkpoints, layouts, at every stage and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scenarios

HERE = Path(__file__).resolve().parent
SCENARIOS = {
    "fp16_without_support": 1,
    "nan_on_one_rank": 9,
    "checkpoint": 12,
    "unused": 4,
    "foreign_layout": 3,
    "overflow": 3,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> scenarios.Found:
    """All scenarios, run once in one process group."""
    return scenarios.run(HERE / "seam.py", tmp_path_factory.mktemp("seam") / "out.jsonl", 2, 600)


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: scenarios.Found) -> None:
    scenarios.check(scenario, SCENARIOS, lines)
