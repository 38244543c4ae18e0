"""A Slurm cluster of two nodes on this machine: the job scripts, preemption, a job array, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.house.files import ROOT

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
SKIPPED = 77
"""Exit status of the script where Slurm cannot be had."""


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_runs_on_a_cluster_of_two_nodes(command: Command) -> None:
    # beside this interpreter: the environment need not be active
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    done = command(["bash", ROOT / "tests" / "launch" / "slurm_cluster.sh"], timeout=850, env=env)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().splitlines()[-1].removeprefix("skipped: "))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert len(checks) > 20, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_script_without_slurm_says_how_it_is_used(script: Path, command: Command) -> None:
    done = command(["env", "-u", "SLURM_JOB_ID", "bash", script, "recipe.json"])
    assert done.returncode == 2
    assert "Usage: sbatch" in done.stderr
    assert f"launch/slurm/{script.name}" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_script_in_the_wrong_folder_is_told(script: Path, command: Command, tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "0"}
    done = command(["bash", script, "recipe.json"], env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is not the project's folder" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_script_parses(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


RECIPE = """
set -u
. launch/slurm/common.sh
dsso_recipe "usage" "$@"
printf '%s\\n' "${arguments[@]}"
"""


@pytest.mark.parametrize(
    ("given", "restarts", "expected"),
    [
        ((), 0, ("--output_dir", "runs/setup-7", "--resume", "auto")),
        (("--output_dir", "a"), 0, ("--output_dir", "a", "--resume", "auto")),
        (("--output_dir=a", "--overwrite"), 0, ("--output_dir=a", "--overwrite")),
        (("--output_dir=a", "--overwrite"), 1, ("--output_dir=a", "--resume", "auto")),
        (
            ("--resume", "b", "--set", "x=1"),
            0,
            ("--resume", "b", "--set", "x=1", "--output_dir", "runs/setup-7"),
        ),
        (
            ("--resume", "b", "--set", "x=1"),
            2,
            ("--set", "x=1", "--output_dir", "runs/setup-7", "--resume", "auto"),
        ),
    ],
)
def test_a_job_that_is_queued_again_goes_on(
    given: tuple[str, ...], restarts: int, expected: tuple[str, ...], command: Command
) -> None:
    """`--overwrite` and the checkpoint to start from are for the first start."""
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = command(["bash", "-c", RECIPE, "job", "tests/launch/setup.json", *given], env=env)
    assert done.returncode == 2
    assert "there is no recipe tests/launch/setup.json" in done.stderr
    done = command(["bash", "-c", RECIPE, "job", "setup.cfg", *given], env=env)
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == tuple(word.replace("setup-7", "setup.cfg-7") for word in expected)
