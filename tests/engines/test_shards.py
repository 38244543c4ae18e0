"""The FSDP2 and DDP engines on two ranks: bad batches, unused layers, shards, evaluation, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scenarios

HERE = Path(__file__).resolve().parent
SCENARIOS = {
    "refusals": 1,
    "nan_on_one_rank": 4,
    "no_host_synchronization": 4,
    "rank_0_decides": 2,
    "evaluation_within_a_window": 2,
    "unused": 3,
    "unused_in_an_older_torch": 2,
    "checkpoint": 5,
    "shards": 2,
    "text_is_written_as_by_one_process": 2,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> scenarios.Found:
    """All scenarios, run once in one process group."""
    return scenarios.run(HERE / "shards.py", tmp_path_factory.mktemp("shards") / "out.jsonl", 2, 300)


@pytest.mark.dist
@pytest.mark.timeout(400)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: scenarios.Found) -> None:
    scenarios.check(scenario, SCENARIOS, lines)
