"""A run whose time is up leaves by itself, with a checkpoint, and goes on as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.runs import checkpoints, lines, partitions, train, write_recipe

LIMIT = ("--set", "dsso.train.time_limit_minutes=0.001")
"""Over before the first step."""


def test_a_run_leaves_before_its_time_is_up_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    arguments = ("--ds_config", recipe, "--output_dir", out, "--resume", "auto")
    for step in (1, 2):  # each start makes headway, however late it is
        assert train(monkeypatch, *arguments, *LIMIT) == 138
        told = capfd.readouterr()
        assert "0 s are left of the job, another step and a checkpoint may take" in told.err
        assert f"stopped after step {step}; --resume auto goes on" in told.out
        assert checkpoints(out)[-1] == f"step_{step:08d}"
    assert "the recipe has changed" not in told.out
    # What a checkpoint takes is known from the start before.
    assert "may take 95 s" not in told.err
    assert train(monkeypatch, *arguments) == 0
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "whole") == 0
    assert lines(out) == lines(tmp_path / "whole")
    mine, theirs = partitions(out), partitions(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_limit_of_a_slurm_job_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", tmp_path / "out") == 138
    monkeypatch.setenv("SLURM_JOB_END_TIME", "32503680000")
    again = ("--ds_config", write_recipe(tmp_path), "--output_dir", tmp_path / "out", "--resume", "auto")
    assert train(monkeypatch, *again) == 0
