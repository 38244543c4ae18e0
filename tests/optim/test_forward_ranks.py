"""Methods that need only losses, on two ranks (four and eight with --slow): replicas, FSDP2 and ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scenarios

HERE = Path(__file__).resolve().parent
SCENARIOS = {
    "the_course_of_one_process": 32,
    "what_cannot_be_spread": 1,
    "steps_of_no_length": 19,
    "a_bad_loss_on_one_rank": 6,
    "what_a_rank_keeps": 12,
    "texts_under_perturbed_weights": 4,
    "a_checkpoint_goes_on": 8,
    "a_checkpoint_on_other_ranks": 8,
    "directions_of_its_own_on_slices": 2,
    "sums_of_uneven_shares": 2,
    "sums_of_another_number": 2,
    "ranks_that_have_gone_apart": 2,
}


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))]
)
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> scenarios.Found:
    """All scenarios, run once in one process group."""
    out = tmp_path_factory.mktemp("forward") / "out.jsonl"
    return scenarios.run(HERE / "forward_ranks.py", out, request.param, 280 if request.param < 8 else 900)


@pytest.mark.dist
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: scenarios.Found) -> None:
    scenarios.check(scenario, SCENARIOS, lines)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_steps_of_no_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS_OF_NO_LENGTH", "1000")
    found = scenarios.run(HERE / "forward_ranks.py", tmp_path / "out.jsonl", 2, 1400)
    scenarios.check("steps_of_no_length", {"steps_of_no_length": 11}, found)
