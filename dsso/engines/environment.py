"""Which process this is among how many, whoever launched it; starting and ending the process group.

`launchers` reads what the launcher says and `rendezvous` sees to it that the ranks find each other. No launcher means
one process and no process group; MPI is looked for under mpirun only.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsso.engines import rendezvous
from dsso.engines.launchers import TORCH_VARIABLES, Environment, find
from dsso.parallel import rollcall

_GRACE_SECONDS = 0.1

_arranged: dict[str, tuple[Environment, dict[str, str]]] = {}
"""What `arrange` has found, with the variables as it has left them."""


def launch_environment() -> Environment:
    """Read the launcher's variables; nothing is started.

    Raises:
        RecipeError: when half of a launcher's variables are set, or two launchers contradict each other.
    """
    if _arranged:
        # The variables of torch are ours then, and would hide the launcher.
        place, variables = _arranged["now"]
        if all(os.environ.get(name) == value for name, value in variables.items()):
            return place
    return find(os.environ)


def arrange(environment: Environment, interface: str | None = None) -> None:
    """Let the ranks know where they meet; `start` does it where it has not been done. Not collective but under MPI.

    Args:
        environment: from `launch_environment`.
        interface: name of the network interface to use, `dsso.train.interface`.

    Raises:
        RecipeError: there is no such interface, MPI cannot be used, or the address of rank 0 is not known.
        RunError: the port of the job is taken.
    """
    if _arranged and _arranged["now"][0] == environment == launch_environment():
        return
    rendezvous.arrange(environment, interface)
    if environment.launcher in ("srun", "mpirun"):
        _arranged["now"] = (environment, {name: os.environ[name] for name in TORCH_VARIABLES})


def start(environment: Environment, timeout_minutes: float = 10.0, interface: str | None = None) -> None:
    """Start the process group, unless there is no launcher or it is running already.

    Args:
        environment: from `launch_environment`.
        timeout_minutes: a collective that waits longer than this for another rank fails.
        interface: see `arrange`.

    Raises:
        RecipeError, RunError: as `arrange`.
    """
    if environment.launcher == "none" or dist.is_initialized():
        return
    arrange(environment, interface)
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    # The host has a group of its own beside the GPUs': flags and objects need not pass through a device.
    backend = "cpu:gloo,cuda:nccl" if environment.device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store = rendezvous.store(environment, timeout)
    if store is None:
        store = _store_of_attempt(environment, timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
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
    settle()
    dist.destroy_process_group()


def settle() -> None:
    """Wait until every rank has come this far and nothing is on its way any more; collective.

    For ranks that leave by `os._exit` behind it: none of them is ended by its launcher because another was first.
    """
    if not dist.is_initialized():
        return
    rollcall.stop()
    if dist.get_world_size() > 1:
        dist.barrier()
        time.sleep(_GRACE_SECONDS)
