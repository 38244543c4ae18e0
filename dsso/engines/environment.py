"""Which process this is among how many, whoever launched it; starting and ending the process group.

Known launchers set `RANK`, `LOCAL_RANK` and `WORLD_SIZE` (`deepspeed`, `torchrun`, `accelerate`). None of them set
means one process and no process group; no MPI is looked for.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsso.errors import RecipeError
from dsso.parallel import rollcall

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE_SECONDS = 0.1


@dataclass(frozen=True)
class Environment:
    """This process among the launched ones.

    Attributes:
        rank, local_rank, world_size: as the launcher numbers them.
        launcher: `none` or `env` (a launcher that sets the variables of torch).
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


def launch_environment() -> Environment:
    """Read the launcher's variables; nothing is started.

    Raises:
        RecipeError: when half of a launcher's variables are set.
    """
    present = [name for name in _NEEDED if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return Environment()
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise RecipeError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}",
            where="environment",
            remedy="start through deepspeed or torchrun, or unset these variables to run one process",
        )
    return Environment(
        int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), "env"
    )


def start(environment: Environment, timeout_minutes: float = 10.0) -> None:
    """Start the process group, unless there is no launcher or it is running already.

    Args:
        environment: from `launch_environment`.
        timeout_minutes: a collective that waits longer than this for another rank fails.
    """
    if environment.launcher == "none" or dist.is_initialized():
        return
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    # The host has a group of its own beside the GPUs': flags and objects need not pass through a device.
    backend = "cpu:gloo,cuda:nccl" if environment.device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store = _store_of_attempt(environment, timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=environment.rank, world_size=environment.world_size
        )
    rollcall.start(60.0 * timeout_minutes)


def _store_of_attempt(environment: Environment, timeout: timedelta) -> Any:
    """A part of the launcher's store for this attempt alone; None where the launcher keeps none.

    torchrun starts ranks again with the same store, in which those before have left their addresses: a process group
    made from it would wait for processes that are dead.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    client: Any = getattr(dist, "TCPStore")  # noqa: B009 (it has no types)
    store = client(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), environment.world_size, False, timeout
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed_c10d.PrefixStore(f"dsso/attempt/{attempt}", store)


def bound_waits(minutes: float) -> None:
    """Give every process group a time-out: those that an engine or a method made for itself have torch's default.

    Args:
        minutes: a collective that waits longer than this for another rank fails.
    """
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def stop() -> None:
    """End the process group, if there is one; every rank calls it as its last collective call.

    Threads of the group let go of tensors a moment after a collective call has returned, for which they need the
    interpreter; one that asks for it while the process ends aborts the process. FSDP2's groups outlive
    `destroy_process_group`, which else waits for its threads, so they are given the moment here.
    """
    if not dist.is_initialized():
        return
    rollcall.stop()
    if dist.get_world_size() > 1:
        dist.barrier()
        time.sleep(_GRACE_SECONDS)
    dist.destroy_process_group()
