"""Planned bytes against those of the tensors of real runs on one and on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plan.cases import FORWARD, ONE_RANK, TWO_RANKS, planned

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 0.05


def counted(
    folder: Path, cases: dict[str, dict[str, Any]], world_size: int
) -> dict[str, list[dict[str, int]]]:
    """Run all cases in one process group; for each of them what every rank counted."""
    source, out = folder / "cases.json", folder / "out.jsonl"
    source.write_text(json.dumps(list(cases.items())))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world_size}",
    ]
    command += [str(ROOT / "tests" / "plan" / "counted.py"), str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[dict[str, int]]] = {}
    for line in out.read_text().splitlines():
        one = json.loads(line)
        found.setdefault(one["name"], []).append(one)
    return {name: sorted(lines, key=lambda line: line["rank"]) for name, lines in found.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Counts of all cases on two ranks."""
    return counted(tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Counts of all cases on one rank."""
    return counted(tmp_path_factory.mktemp("one"), ONE_RANK, 1)


def compare(raw: dict[str, Any], lines: list[dict[str, int]]) -> None:
    """Every figure of every rank is within the promised distance, what is no estimate is exact."""
    found = planned(raw, len(lines))
    for line, rank in zip(lines, found.ranks, strict=True):
        assert rank.weights == line["weights"]
        assert rank.masters == line["masters"]
        assert rank.factors == line["factors"]
        # Beside the moments the optimizer counts its steps.
        assert rank.moments == pytest.approx(line["moments"], rel=CLOSE)
        assert rank.moments + rank.factors == pytest.approx(line["state_bytes"], rel=CLOSE)
        assert rank.gradients + rank.lasting + rank.answers == pytest.approx(line["gradients"], rel=CLOSE)
        # DeepSpeed keeps its bucket between the micro-batches of stage 1, and at stage 3 for good.
        kept = (
            rank.buckets
            if found.engine == "zero-1" and raw["gradient_accumulation_steps"] > 1
            else rank.lasting
        )
        assert rank.gradients_in_pass + kept + max(rank.vectors, rank.answers) == pytest.approx(
            line["gradients_in_pass"], rel=CLOSE
        )
        narrow = raw["optimizer"]["params"].get("wire_dtype") == "bfloat16"
        assert found.wire.statistics == (2 if narrow else 4) * line["sent"]
        # What leaves during the pass is an estimate from above, what stays to its end is not.
        assert line["sums"] <= rank.sums
        if not found.sent_in_pass:
            assert line["sums"] == pytest.approx(rank.sums, rel=CLOSE)


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, two_ranks: dict[str, list[dict[str, int]]]) -> None:
    compare(TWO_RANKS[name], two_ranks[name])


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(name: str, one_rank: dict[str, list[dict[str, int]]]) -> None:
    compare(ONE_RANK[name], one_rank[name])


@pytest.fixture(scope="module", params=[1, 2])
def forward(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, int]]]:
    """Counts of the methods from forward passes."""
    return counted(tmp_path_factory.mktemp("forward"), FORWARD, request.param)


@pytest.mark.dist
@pytest.mark.parametrize("name", FORWARD)
def test_methods_from_forward_passes(name: str, forward: dict[str, list[dict[str, int]]]) -> None:
    lines = forward[name]
    found = planned(FORWARD[name], len(lines))
    for line, rank in zip(lines, found.ranks, strict=True):
        assert rank.weights == line["weights"]
        assert rank.masters == line["masters"]
        assert rank.moments == line["moments"]
        assert rank.masters + rank.moments == line["state_bytes"]
        assert line["beside"] <= rank.buckets
        assert found.operations.passes == line["passes"]
        if "fp32 mezo" in name and len(lines) == 1:
            assert line["beside"] > 0
