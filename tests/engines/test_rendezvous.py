"""Addresses and ports of a job, and network interfaces."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import pytest

from dsso.engines import rendezvous
from dsso.engines.launchers import TORCH_VARIABLES, Environment
from dsso.errors import RecipeError, RunError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of torch as they were, and no port left open."""
    for name in (*TORCH_VARIABLES, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendezvous, "_listening", [])


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("cpu1,gpu[03-05]", "cpu1"),
        ("rack[1-2]node[5-8]", "rack1node5"),
        ("n[9,11-12]-ib", "n9-ib"),
        ("", ""),
    ],
)
def test_the_first_node_of_a_list(listed: str, first: str) -> None:
    assert rendezvous.first_node(listed) == first


def test_where_a_step_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert rendezvous.srun_address(step) == "localhost"
    assert rendezvous.srun_address(step | {"MASTER_ADDR": "head"}) == "head"

    def unknown(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert rendezvous.srun_address(step) == "10.0.0.1"
    with pytest.raises(RecipeError, match="export MASTER_ADDR before srun"):
        rendezvous.srun_address({"SLURM_STEP_NODELIST": "gpu[3-4]"})


def test_each_step_has_a_port_of_its_own() -> None:
    jobs = [
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(700, 900) for step in range(4)
    ]
    ports = {rendezvous.srun_port(job) for job in jobs}
    assert len(ports) == len(jobs)
    # neither privileged, nor among those that outgoing connections get
    assert min(ports) > 1024
    assert max(ports) < 32_768
    assert rendezvous.srun_port({"MASTER_PORT": "29500", **jobs[0]}) == 29_500
    assert rendezvous.srun_port({"SLURM_STEP_RESV_PORTS": "12345-12348", **jobs[0]}) == 12_345
    with pytest.raises(RecipeError, match="MASTER_PORT: is no port"):
        rendezvous.srun_port({"MASTER_PORT": "http"})


def test_rank_0_keeps_its_port_and_a_taken_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RunError, match=r"cannot be opened.*\n.*got: \d+\n.*free one"):
            rendezvous.arrange(Environment(0, 0, 2, "srun"))
    rendezvous.arrange(Environment(0, 0, 2, "srun"))
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", port))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("localhost", str(port))
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")
    rendezvous._listening.pop().close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_port_is_handed_over(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family) as probe:
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this host has no IPv6")
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    place = Environment(0, 0, 1, "srun")
    rendezvous.arrange(place)
    store = rendezvous.store(place, timedelta(seconds=10))
    assert store is not None
    assert store.port == port  # type: ignore[attr-defined]
    store.set("word", "met")
    assert store.get("word") == b"met"
    assert rendezvous._listening == []
    assert rendezvous.store(Environment(0, 0, 1, "torchrun"), timedelta(seconds=10)) is None


def test_an_interface_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(
        name
        for name, every in psutil.net_if_addrs().items()
        if any(one.address == "127.0.0.1" for one in every)
    )
    rendezvous.arrange(Environment(1, 1, 2, "torchrun"), loopback)
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"
    assert rendezvous.own_address(loopback) == "127.0.0.1"
    with pytest.raises(
        RecipeError, match=f"dsso.train.interface(.|\n)*got: 'ib7'(.|\n)*allowed: .*{loopback}"
    ):
        rendezvous.arrange(Environment(1, 1, 2, "torchrun"), "ib7")


def test_an_interface_with_ipv6_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = type(next(iter(psutil.net_if_addrs().values()))[0])

    def interfaces() -> dict[str, list[object]]:
        link = entry(socket.AF_INET6, "fe80::1%ib0", None, None, None)
        return {"ib0": [link, entry(socket.AF_INET6, "fd00::7", None, None, None)], "ib1": [link]}

    monkeypatch.setattr(psutil, "net_if_addrs", interfaces)
    assert rendezvous.address_of("ib0") == "fd00::7"
    with pytest.raises(RecipeError, match=r"has no address(.|\n)*allowed: ib0"):
        rendezvous.address_of("ib1")


def test_mpi_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"2 processes.*need mpi4py(.|\n)*dsso\[mpi\]"):
        rendezvous.arrange(Environment(1, 1, 2, "mpirun"))
