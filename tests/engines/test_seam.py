"""The DeepSpeed seam on two ranks: bad batches, fp16 overflow, checkpoints, layouts, at every stage and dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = {
    "fp16_without_support": 1,
    "nan_on_one_rank": 9,
    "checkpoint": 12,
    "unused": 4,
    "foreign_layout": 3,
    "overflow": 3,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """All scenarios, run once in one process group."""
    out = tmp_path_factory.mktemp("seam") / "out.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "engines" / "seam.py"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str, lines: list[dict[str, object]]) -> None:
    mine = [line for line in lines if str(line["name"]).startswith(scenario)]
    assert len(mine) == SCENARIOS[scenario]
    wrong = [line for line in mine if line["problems"]]
    assert not wrong, "\n".join(f"{line['name']}: {line['problems']}" for line in wrong)
