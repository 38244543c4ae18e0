"""DeepSpeed's hostfile on two addresses of this machine, by each way that needs no login.

Logging in is played by a program called `ssh` that runs the command here.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.launch.runs import ROOT, config, summary, write_recipe
from tests.launch.test_launchers import DDP, SHORT, mpich

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300)]

SSH = """#!/bin/sh
while :; do
    case "$1" in
    -o | -l | -p) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
echo "$1" >>"$(dirname "$0")/visited"
shift
exec sh -c "$*"
"""


def words(folder: Path, *options: object) -> list[object]:
    """DeepSpeed's launcher with a hostfile of two nodes that have a slot each."""
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    program = Path(sys.executable).parent / "deepspeed"
    return [program, "--hostfile", hosts, "--master_addr", "127.0.0.1", *options, ROOT / "launch/train.py"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_launcher_on_each_node_without_ssh(tmp_path: Path, command: Command) -> None:
    port, out = free_port(), tmp_path / "out"
    arguments = ("--ds_config", write_recipe(tmp_path, SHORT), "--output_dir", out, *DDP)
    one, other = (
        shlex.join(
            map(str, [*words(tmp_path, "--master_port", port, "--no_ssh", "--node_rank", node), *arguments])
        )
        for node in (0, 1)
    )
    done = command(["bash", "-c", f"{one} & first=$!; {other} && wait $first"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(out)["world_size"] == 2
    assert config(out)["launcher"] == "deepspeed"


def test_through_mpich(tmp_path: Path, command: Command) -> None:
    mpich()
    options = ("--master_port", free_port(), "--no_ssh_check", "--launcher", "mpich")
    line = words(tmp_path, *options, "--launcher_args", "-launcher fork")
    out = tmp_path / "out"
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = command(
        [*line, "--ds_config", write_recipe(tmp_path, SHORT), "--output_dir", out], env={"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(out)["world_size"] == 2


def test_through_pdsh(tmp_path: Path, command: Command) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    out = tmp_path / "out"
    line = words(tmp_path, "--master_port", free_port())
    path = f"{ssh.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = command(
        [*line, "--ds_config", write_recipe(tmp_path, SHORT), "--output_dir", out], env={"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(out)["world_size"] == 2
    assert set((ssh.parent / "visited").read_text().split()) == {"127.0.0.1", "127.0.0.2"}
