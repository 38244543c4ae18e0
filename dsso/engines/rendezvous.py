"""Where the ranks of a job meet: an address and a port of the job's own, and the network interface they use.

`torchrun`, `deepspeed` and `accelerate` bring both along. Under `srun` the address is that of the step's first node and
the port follows from the numbers of job and step, so that two jobs on a node do not meet; `MASTER_ADDR` and
`MASTER_PORT` take precedence. Under `mpirun` rank 0 takes a free port and tells the others through MPI. Nothing logs in
to another node.

Rank 0 opens its port at once and keeps it until the process group starts: loading a model takes minutes, in which
another job could take the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import re
import socket
import warnings
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed exports them without types

from dsso.engines.launchers import Environment
from dsso.errors import RecipeError, RunError

_LOOPBACK = "127.0.0.1"
_FIRST_PORT, _PORTS = 10_007, 20_011
"""Below the ports that Linux gives to outgoing connections (32768 and above), above those of well-known services."""
_JOB_STRIDE = 17

_listening: list[socket.socket] = []
"""The port of rank 0, until torch takes it over."""


def arrange(place: Environment, interface: str | None = None) -> None:
    """Set the variables by which torch and DeepSpeed find the other ranks; once, before a process group starts.

    Args:
        place: from `launchers.find`.
        interface: name of the network interface to use; None: the libraries' choice.

    Raises:
        RecipeError: there is no such interface, MPI cannot be used, or the address of rank 0 is not known.
        RunError: the port of the job is taken.
    """
    if place.launcher == "none":
        return
    if interface is not None:
        address_of(interface)
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the sign it would be a prefix
    if place.launcher == "srun":
        address, port = srun_address(os.environ), srun_port(os.environ)
        if place.rank == 0:
            _listen(port)
    elif place.launcher == "mpirun":
        address, port = _over_mpi(place, interface)
    else:
        return
    local = place.local_rank
    if place.launcher == "srun" and torch.cuda.is_available():
        # Slurm may show each task its own GPU only, which is number 0 then; DeepSpeed takes this variable for it.
        local %= torch.cuda.device_count()
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(local),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def store(place: Environment, timeout: Any) -> Store | None:
    """The store that rank 0 keeps for all, where this module has chosen its port; None: torch makes it.

    Args:
        place: the one that was arranged.
        timeout: a `timedelta`, after which a rank that does not come is given up.
    """
    if place.launcher not in ("srun", "mpirun"):
        return None
    port = int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {}
    if _listening:
        options["master_listen_fd"] = _listening.pop().detach()
    return TCPStore(os.environ["MASTER_ADDR"], port, place.world_size, place.rank == 0, timeout, **options)


def address_of(interface: str) -> str:
    """The address of a network interface of this host: IPv4 where it has one, else IPv6.

    Args:
        interface: its name.

    Raises:
        RecipeError: there is none of that name, or it has no address.
    """
    known = psutil.net_if_addrs()
    if interface not in known:
        raise RecipeError(
            f"{socket.gethostname()} has no such network interface",
            where="dsso.train.interface",
            got=interface,
            allowed=sorted(known),
        )
    found = _addresses(known[interface])
    if not found:
        raise RecipeError(
            f"the interface has no address on {socket.gethostname()}",
            where="dsso.train.interface",
            got=interface,
            allowed=sorted(name for name, every in known.items() if _addresses(every)),
        )
    return found[0]


def _addresses(every: Any) -> list[str]:
    """IPv4 addresses, then IPv6 ones that mean something on another host."""
    four = [one.address for one in every if one.family == socket.AF_INET]
    six = [one.address for one in every if one.family == socket.AF_INET6]
    return four + [one for one in six if "%" not in one]


def own_address(interface: str | None) -> str:
    """The address at which other hosts find this one, as far as it can tell.

    Args:
        interface: whose address it is to be; None: any that leads outside.
    """
    if interface is not None:
        return address_of(interface)
    candidates: list[str] = []
    with contextlib.suppress(OSError):
        candidates += [str(one[4][0]) for one in socket.getaddrinfo(socket.gethostname(), None)]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, every in psutil.net_if_addrs().items():
        candidates += _addresses(every) if name in up else []
    outside = [one for one in candidates if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    return next((one for one in outside if "%" not in one), _LOOPBACK)


def srun_address(env: Mapping[str, str]) -> str:
    """Name or address of the node that has rank 0 of a step.

    Args:
        env: environment variables.

    Raises:
        RecipeError: it cannot be told.
    """
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    node = first_node(listed)
    if node:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(node, None)
            return node
    # In a batch script the step is launched on the first node of the job, which has rank 0.
    launched = env.get("SLURM_LAUNCH_NODE_IPADDR")
    if not launched:
        raise RecipeError(
            "the address of the node of rank 0 is not known: its name cannot be resolved",
            where="SLURM_STEP_NODELIST",
            got=listed,
            remedy="export MASTER_ADDR before srun",
        )
    return launched


def first_node(listed: str) -> str:
    """The first name of a list of nodes as Slurm writes it, `gpu[03-05,9],cpu1` say.

    Args:
        listed: the list.
    """
    # A name may have several brackets (rack[1-2]node[5-8]); commas inside brackets part numbers, not names.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", listed)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def srun_port(env: Mapping[str, str]) -> int:
    """The port of a step: `MASTER_PORT`, one that Slurm has reserved for it, or one made from its numbers.

    Args:
        env: environment variables.

    Raises:
        RecipeError: `MASTER_PORT` is no port.
    """
    if env.get("MASTER_PORT"):
        if not env["MASTER_PORT"].isdigit() or not 0 < int(env["MASTER_PORT"]) < 65_536:
            raise RecipeError("is no port", where="environment variable MASTER_PORT", got=env["MASTER_PORT"])
        return int(env["MASTER_PORT"])
    reserved = re.match(r"\d+", env.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved.group())
    job = int(env.get("SLURM_JOB_ID", "0"))
    step = int(env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0")))
    return _FIRST_PORT + (job * _JOB_STRIDE + step) % _PORTS


def _listen(port: int) -> int:
    """Open the port of rank 0, on all its addresses; 0 takes a free one, which is returned."""
    try:
        if socket.has_dualstack_ipv6():
            opened = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            opened = socket.create_server(("", port))
    except OSError as error:
        raise RunError(
            f"the port of this job cannot be opened on {socket.gethostname()} ({error.strerror})",
            where="MASTER_PORT",
            got=port,
            remedy="export MASTER_PORT with a free one before srun",
        ) from None
    _listening.append(opened)
    return int(opened.getsockname()[1])


def _over_mpi(place: Environment, interface: str | None) -> tuple[str, int]:
    """Address and port of rank 0, told to the others through MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        raise RecipeError(
            f"mpirun started {place.world_size} processes, and they need mpi4py to find each other",
            where="environment",
            remedy="pip install 'dsso[mpi]' (mpi4py), or start through torchrun, deepspeed or srun",
        )
    try:
        import mpi4py

        # Initialized below: MPICH ends the process there when Open MPI has started it.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of what is checked below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RecipeError(
            f"mpi4py cannot be used: {str(error).splitlines()[0]}",
            where="environment",
            remedy="let LD_LIBRARY_PATH or MPI4PY_LIBMPI lead to the library of the MPI whose mpirun this is",
        ) from None
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    open_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    if open_mpi != ("Open MPI" in library):
        raise _another_mpi(library, f"mpirun is that of {'Open MPI' if open_mpi else 'MPICH or its kin'}")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.world_size):
        raise _another_mpi(
            library,
            f"it takes this process for rank {world.rank} of {world.size}, mpirun for {place}",
        )
    on_this_host = world.Split_type(MPI.COMM_TYPE_SHARED)
    told = None
    if place.rank == 0:
        alone = on_this_host.size == world.size and interface is None
        told = (_LOOPBACK if alone else own_address(interface), _listen(0))
    on_this_host.Free()
    address, port = world.bcast(told)
    return str(address), int(port)


def _another_mpi(library: str, sign: str) -> RecipeError:
    return RecipeError(
        f"mpi4py is of another MPI than mpirun: {sign}",
        where="environment",
        got=library,
        remedy="start with the mpirun of that library, or let MPI4PY_MPIABI (mpich, openmpi) and LD_LIBRARY_PATH name"
        " the other one",
    )
