"""The benchmark of MeZO runs and says what it says it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "zeroth_order.py"
KEYS = {"noise_gaussian_speedup", "noise_rademacher_speedup", "step_speedup_1x128", "memory_ratio"}


def test_the_benchmark_runs(command) -> None:
    done = command([sys.executable, SCRIPT, "--quick"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) >= KEYS
    assert found["quick"] is True
    # Weights, what an evaluation makes, and one copy of the largest part at most.
    assert 1.0 < found["memory_ratio"] < 1.02 + found["largest_copy"]
