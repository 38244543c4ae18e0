"""Ranks from the variables of each launcher, of launchers inside one another, and of half of them."""

from __future__ import annotations

import pytest

from dsso.engines.launchers import Environment, find
from dsso.errors import RecipeError

TORCH = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}
"""What is set everywhere in a job of four tasks, in the shell of salloc too."""
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = JOB | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
AMONG_FOUR = (3, 1, 4)
NODE_DAEMON = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
"""A step of one task a node, which starts more processes by itself."""


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        pytest.param(TORCH, "env", id="variables-of-torch"),
        pytest.param(TORCH | {"TORCHELASTIC_RUN_ID": "none"}, "torchrun", id="torchrun"),
        pytest.param(
            TORCH | {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_DYNAMO_BACKEND": "NO"},
            "accelerate",
            id="accelerate",
        ),
        pytest.param(TORCH | {"CROSS_RANK": "0", "CROSS_SIZE": "1"}, "deepspeed", id="deepspeed"),
        pytest.param(STEP, "srun", id="srun"),
        pytest.param(STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun", id="srun-with-pmi2"),
        pytest.param(
            STEP | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, "srun", id="srun-with-a-meeting-place"
        ),
        pytest.param(OPEN_MPI, "mpirun", id="open-mpi"),
        pytest.param(MPICH, "mpirun", id="mpich"),
        pytest.param(STEP | NODE_DAEMON | OPEN_MPI, "mpirun", id="mpirun-in-a-job"),
        pytest.param(STEP | NODE_DAEMON | MPICH, "mpirun", id="mpich-in-a-job"),
        pytest.param(STEP | NODE_DAEMON | TORCH, "env", id="a-launcher-of-its-own-under-srun"),
        pytest.param(
            STEP | TORCH | {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"},
            "torchrun",
            id="torchrun-numbers-anew-under-srun",
        ),
    ],
)
def test_each_launcher(env: dict[str, str], launcher: str) -> None:
    found = find(env)
    assert found.launcher == launcher
    if launcher != "torchrun" or "SLURM_JOB_ID" not in env:
        assert (found.rank, found.local_rank, found.world_size) == AMONG_FOUR


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, id="a-meeting-place-alone"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "no"}, id="accelerate-with-one-process"),
        pytest.param(JOB, id="shell-of-salloc"),
        pytest.param(BATCH, id="batch-script"),
        pytest.param(BATCH | {"SLURM_STEP_ID": "4294967291"}, id="batch-script-of-newer-slurm"),
        pytest.param(STEP | {"SLURM_STEP_ID": "4294967290"}, id="interactive-step"),
    ],
)
def test_one_process(env: dict[str, str]) -> None:
    assert find(env) == Environment()


def test_a_shell_of_srun_is_one_process_and_a_step_started_from_it_is_not() -> None:
    inside = STEP | {"SLURM_PTY_PORT": "4242"}
    assert find(inside, has_terminal=True) == Environment()
    assert find(inside, has_terminal=False).launcher == "srun"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        pytest.param({"RANK": "0", "WORLD_SIZE": "2"}, ["LOCAL_RANK, MASTER_ADDR"], id="half-of-torch"),
        pytest.param(
            {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"},
            ["srun set SLURM_PROCID", "but not SLURM_LOCALID"],
            id="half-of-srun",
        ),
        pytest.param({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE"], id="half-of-open-mpi"),
        pytest.param({"PMI_RANK": "0"}, ["but not PMI_SIZE"], id="half-of-mpich"),
        pytest.param({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["but not MPI_LOCALRANKID"], id="no-local-rank"),
        pytest.param(TORCH | {"RANK": "one"}, ["environment variable RANK", "'one'"], id="no-number"),
        pytest.param(TORCH | {"RANK": "4"}, ["RANK 4", "do not fit WORLD_SIZE 4"], id="beyond-the-last"),
        pytest.param(
            STEP | TORCH | {"RANK": "0"}, ["rank 0 of 4", "rank 3 of 4", "contradict"], id="torch-and-srun"
        ),
        pytest.param(
            STEP | TORCH | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            ["rank 0 of 1", "rank 3 of 4"],
            id="alone-in-a-step",
        ),
        pytest.param(OPEN_MPI | TORCH | {"RANK": "1"}, ["rank 1 of 4", "rank 3 of 4"], id="torch-and-mpirun"),
        pytest.param(OPEN_MPI | MPICH | {"PMI_SIZE": "8"}, ["rank 3 of 8", "rank 3 of 4"], id="two-mpis"),
        pytest.param(
            STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"}, ["PMI_RANK", "rank 3 of 4"], id="pmi-and-srun"
        ),
        pytest.param(STEP | {"SLURM_NTASKS": "1"}, ["SLURM_STEP_NUM_TASKS", "1 and 4"], id="inherited-step"),
    ],
)
def test_what_cannot_be_is_refused(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        find(env)
    told = str(caught.value)
    assert all(word in told for word in words), told
    assert "remedy: " in told
