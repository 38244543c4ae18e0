"""The FSDP2 and DDP engines on two ranks: bad batches, unused layers, shards, evaluation, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = {
    "refusals(": 1,
    "nan_on_one_rank(": 4,
    "no_host_synchronization(": 4,
    "rank_0_decides(": 2,
    "evaluation_within_a_window(": 2,
    "unused(": 3,
    "unused_in_an_older_torch(": 2,
    "checkpoint(": 5,
    "shards(": 2,
    "text_is_written_as_by_one_process(": 2,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """All scenarios, run once in one process group."""
    out = tmp_path_factory.mktemp("shards") / "out.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "engines" / "shards.py"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (out.read_text() if out.exists() else "") + done.stderr[-4000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.timeout(400)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: list[dict[str, object]]) -> None:
    mine = [line for line in lines if str(line["name"]).startswith(scenario)]
    assert len(mine) == SCENARIOS[scenario]
    wrong = [line for line in mine if line["problems"]]
    assert not wrong, "\n".join(f"{line['name']}: {line['problems']}" for line in wrong)
