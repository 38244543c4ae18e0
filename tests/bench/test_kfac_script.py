"""The benchmark of K-FAC runs and says what it says it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "kfac.py"
KEYS = {
    "every_step",
    "factor_step",
    "plain_step",
    "amortised_10_100",
    "spike",
    "cosine",
    "bytes_per_rank",
    "wire_ratio",
}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_the_benchmark_runs(command, tmp_path) -> None:
    done = command([sys.executable, SCRIPT, "--out", tmp_path, "--quick"], timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"exact", "subsampled", "low_rank"}
    for one in found.values():
        assert set(one) == KEYS
        assert one["wire_ratio"] <= 0.27
        held = {int(world): count for world, count in one["bytes_per_rank"].items()}
        # The widest side is 2048: nothing is larger than its square.
        assert all(count <= held[1] / world + 4 * 2048 * 2049 for world, count in held.items())
    assert found["exact"]["cosine"] == pytest.approx(1.0, abs=1e-4)
    # After two measurements only; an update that has nothing to do with the exact one is near zero.
    assert found["subsampled"]["cosine"] > 0.6
    assert found["low_rank"]["cosine"] > 0.6
    assert (tmp_path / "kfac.png").stat().st_size > 10_000
