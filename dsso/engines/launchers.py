"""What the launchers say about a process: its rank among how many, read from their environment variables.

| launcher | variables |
|---|---|
| `torchrun`, `deepspeed`, `accelerate launch` | `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` |
| `srun` | `SLURM_STEP_ID`, `SLURM_PROCID`, `SLURM_LOCALID`, `SLURM_STEP_NUM_TASKS` |
| `mpirun` of Open MPI | `OMPI_COMM_WORLD_RANK`, `…_LOCAL_RANK`, `…_SIZE` |
| `mpirun` of MPICH, Intel MPI and other kin of MPICH | `PMI_RANK`, `MPI_LOCALRANKID`, `PMI_SIZE` |

The innermost one counts: torchrun under srun starts several processes a task, and mpirun inside a job of Slurm may use
srun for its own daemons. Variables of two launchers that cannot both be right are refused, because a process that takes
itself for the wrong one writes over another's files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dsso.errors import RecipeError

TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch's own rendezvous reads."""
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
_MPICH = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
_PTY = ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL", "SLURM_PTY_WIN_ROW")

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Steps from here on are no step of srun: the batch script, an interactive shell, the external step."""


@dataclass(frozen=True)
class Environment:
    """This process among the launched ones, as its launcher numbers them.

    Attributes:
        rank, local_rank, world_size: of the process; local ranks count the processes of a node.
        launcher: `none`, `torchrun`, `deepspeed`, `accelerate`, `env` (something else that sets the variables of
            torch), `srun` or `mpirun`.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str = "none"

    @property
    def device(self) -> torch.device:
        """The device of this process: its GPU where there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


def find(env: Mapping[str, str], has_terminal: bool | None = None) -> Environment:
    """The place that the innermost launcher has given to this process.

    Args:
        env: environment variables.
        has_terminal: the process belongs to a terminal; None: asked for where it matters.

    Raises:
        RecipeError: half of a launcher's variables are set, one is no number that can be, or two launchers contradict
            each other.
    """
    torch, srun, mpi = _torch(env), _srun(env, has_terminal), _mpi(env)
    if torch is not None:
        outer = mpi or srun
        # torchrun and deepspeed number their processes themselves, whatever started them.
        if outer is not None and torch.launcher == "env" and not _may_be_inside(torch, outer):
            raise _contradiction(torch, "RANK and WORLD_SIZE", outer)
        return torch
    if mpi is None:
        return srun or Environment()
    if srun is not None and mpi.launcher == "pmi":
        # The PMI of srun itself, for programs that use MPI (--mpi=pmi2).
        if (mpi.rank, mpi.world_size) != (srun.rank, srun.world_size):
            raise _contradiction(mpi, "PMI_RANK and PMI_SIZE", srun)
        return srun
    if mpi.launcher == "pmi":
        _read(env, _MPICH, "mpirun")  # says what is missing
    return replace(mpi, launcher="mpirun")


def _torch(env: Mapping[str, str]) -> Environment | None:
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None  # MASTER_ADDR and MASTER_PORT alone are where the user wants the others to meet
    missing = [name for name in TORCH_VARIABLES if name not in env]
    if missing:
        present = [name for name in TORCH_VARIABLES if name in env]
        raise RecipeError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}",
            where="environment",
            remedy="start through deepspeed, torchrun, srun or mpirun, or unset these variables to run one process",
        )
    rank, local_rank, world_size = _read(env, ("RANK", "LOCAL_RANK", "WORLD_SIZE"), "the launcher")
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "accelerate" if any(name.startswith("ACCELERATE_") for name in env) else "torchrun"
    else:
        launcher = "deepspeed" if {"CROSS_RANK", "CROSS_SIZE"} <= env.keys() else "env"
    return Environment(rank, local_rank, world_size, launcher)


def _srun(env: Mapping[str, str], has_terminal: bool | None) -> Environment | None:
    """The task of a step; None outside of one, as in a batch script, or in the shell of `srun --pty`."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is None or not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    if any(name in env for name in _PTY) and (_has_terminal() if has_terminal is None else has_terminal):
        return None
    tasks = {env[name] for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS") if name in env}
    if len(tasks) > 1:
        raise RecipeError(
            "SLURM_NTASKS and SLURM_STEP_NUM_TASKS contradict each other, so this is no task of that step",
            where="environment",
            got=f"{env['SLURM_NTASKS']} and {env['SLURM_STEP_NUM_TASKS']}",
            remedy='start through srun, or unset "${!SLURM_STEP@}" to run one process (a batch script that was'
            " submitted from within a step has inherited them)",
        )
    names = _SRUN if "SLURM_STEP_NUM_TASKS" in env else ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    return Environment(*_read(env, names, "srun"), "srun")


def _mpi(env: Mapping[str, str]) -> Environment | None:
    """A process of mpirun; `pmi` is the launcher where it can be one of srun as well."""
    open_mpi = any(name in env for name in _OPEN_MPI)
    pmi = "PMI_RANK" in env or "PMI_SIZE" in env
    found = Environment(*_read(env, _OPEN_MPI, "mpirun"), "mpirun") if open_mpi else None
    if not pmi:
        return found
    kind = "mpirun" if "MPI_LOCALRANKID" in env else "pmi"
    mpich = Environment(*_read({"MPI_LOCALRANKID": "0", **env}, _MPICH, "mpirun"), kind)
    if found is not None and (found.rank, found.world_size) != (mpich.rank, mpich.world_size):
        raise _contradiction(mpich, "PMI_RANK and PMI_SIZE", found, "OMPI_COMM_WORLD_RANK and …_SIZE")
    return found or mpich


def _read(env: Mapping[str, str], names: tuple[str, str, str], who: str) -> tuple[int, int, int]:
    """Rank, local rank and number of processes from three variables."""
    missing = [name for name in names if name not in env]
    if missing:
        present = [name for name in names if name in env]
        raise RecipeError(
            f"{who} set {', '.join(present) or 'a part of its variables'} but not {', '.join(missing)}",
            where="environment",
            remedy="start through the launcher itself, without picking or clearing its variables",
        )
    values = []
    for name in names:
        if not env[name].strip().isdigit():
            raise RecipeError(
                "is no number of a process",
                where=f"environment variable {name}",
                got=env[name],
                remedy="start through a launcher, or unset the variable",
            )
        values.append(int(env[name]))
    rank, local_rank, size = values
    if rank >= size or local_rank >= size:
        raise RecipeError(
            f"{names[0]} {rank} and {names[1]} {local_rank} do not fit {names[2]} {size}",
            where="environment",
            allowed="numbers from 0, below the number of processes",
            remedy="start through a launcher, or unset these variables to run one process",
        )
    return rank, local_rank, size


def _may_be_inside(inner: Environment, outer: Environment) -> bool:
    """Whether a process of `outer` may itself have started `inner`, or is the same."""
    if inner.world_size == outer.world_size:
        return inner.rank == outer.rank
    return inner.world_size > outer.world_size


def _contradiction(
    one: Environment, names: str, other: Environment, others: str | None = None
) -> RecipeError:
    others = others or {
        "srun": "SLURM_PROCID and SLURM_STEP_NUM_TASKS",
        "mpirun": "the variables of mpirun",
        "pmi": "PMI_RANK and PMI_SIZE",
    }.get(other.launcher, other.launcher)
    return RecipeError(
        f"two launchers contradict each other: by {names} this is {one}, by {others} it is {other}",
        where="environment",
        remedy="unset the variables of the one that did not start this process (a shell may have inherited or"
        " exported them)",
    )


def _has_terminal() -> bool:
    """Whether the process belongs to a terminal, as the shell of `srun --pty` does and a task of a step does not."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
