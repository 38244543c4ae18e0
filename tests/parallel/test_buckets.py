"""Vectors are summed at their owners whatever the size of the buckets, in groups that do not meet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dsso.parallel.buckets import OwnerBuckets

HERE = Path(__file__).resolve().parent


@pytest.mark.dist
def test_four_ranks_and_the_groups_of_a_mesh(command) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    done = command([*launcher, HERE / "buckets_worker.py"], env={"PYTHONPATH": str(HERE.parents[1])})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "buckets agree" in done.stdout


def test_a_bucket_holds_something() -> None:
    with pytest.raises(ValueError, match="at least one number"):
        OwnerBuckets(0, torch.zeros(()), torch.float32)
