"""What the ranks of K-FAC must agree on when something is out of the ordinary, on four of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scenarios

HERE = Path(__file__).resolve().parent
SCENARIOS = {
    "a_factorization_that_never_succeeds": 6,
    "a_dropped_window_leaves_nothing_behind": 4,
    "every_use_counts": 2,
    "waits_have_an_end": 1,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> scenarios.Found:
    """All scenarios, run once in one process group."""
    return scenarios.run(HERE / "ranks.py", tmp_path_factory.mktemp("ranks") / "out.jsonl", 4, 200)


@pytest.mark.dist
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: scenarios.Found) -> None:
    scenarios.check(scenario, SCENARIOS, lines)
