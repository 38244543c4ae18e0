"""`torchrun --max-restarts` starts ranks again with the store in which those before have left their addresses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command
from tests.launch.runs import free_port


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_ranks_that_are_started_again_find_each_other(command: Command) -> None:
    head = [
        Path(sys.executable).parent / "torchrun",
        "--nnodes",
        "1",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "2",
    ]
    head += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{free_port()}",
        "--monitor-interval",
        "0.2",
    ]
    done = command([*head, ROOT / "tests/engines/restarting.py"], timeout=150.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 1: 3" in done.stdout
