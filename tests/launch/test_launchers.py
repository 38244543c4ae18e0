"""The same recipe under every launcher takes the same steps; what mpirun cannot do is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import ROOT, config, launcher, lines, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

PROGRAMS = Path(sys.executable).parent
SHORT = {
    "dsso.model.dropout": 0.0,
    "train_batch_size": 8,
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "dsso.task.train_examples": 32,
    "dsso.task.eval_examples": 8,
    "dsso.train": {"max_steps": 4, "eval_interval": 4, "log_interval": 1, "save_interval": 4},
}
"""The same global batch at any number of ranks, nothing random, each step logged."""
DDP = ("--set", "dsso.engine=ddp")
TRAIN = ROOT / "launch" / "train.py"
ONE_MACHINE = {"FI_PROVIDER": "tcp", "UCX_TLS": "tcp,self,sm"}
"""MPI libraries look for fast networks first, which takes seconds on a machine with none."""


def mpich() -> Path:
    """MPICH's launcher, of the package `mpich`."""
    found = PROGRAMS / "mpiexec.hydra"
    if not found.exists():
        pytest.skip("the package mpich is not installed")
    pytest.importorskip("mpi4py")
    return found


def open_mpi() -> tuple[Path, dict[str, str]]:
    """Open MPI's launcher, and variables that lead mpi4py to its library."""
    home = Path(os.environ.get("DSSO_OPENMPI") or PROGRAMS.parent / "openmpi")
    if not (home / "bin" / "prterun").exists():
        pytest.skip(f"Open MPI is not installed in {home.name}/ of the environment (DSSO_OPENMPI)")
    pytest.importorskip("mpi4py")
    variables = {
        "LD_LIBRARY_PATH": str(home / "lib"),
        "MPI4PY_LIBMPI": str(home / "lib" / "libmpi.so.40"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return home / "bin" / "mpirun", variables


class Runs:
    """Runs that are started together, each in a process group that ends with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder, SHORT)
        self.started: dict[str, subprocess.Popen[str]] = {}

    def start(
        self, name: str, words: Sequence[object], env: Mapping[str, str] | None = None, *more: str
    ) -> None:
        """`WORDS --ds_config … --output_dir FOLDER/NAME MORE…`."""
        arguments = ["--ds_config", self.recipe, "--output_dir", self.folder / name, *more]
        told = (self.folder / f"{name}.log").open("w")
        self.started[name] = subprocess.Popen(
            [str(word) for word in (*words, *arguments)],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        told.close()

    def told(self, name: str) -> str:
        """What a run has said."""
        return (self.folder / f"{name}.log").read_text()

    def end(self, name: str, status: int = 0) -> Path:
        """Wait for a run; its folder."""
        assert self.started[name].wait(timeout=200) == status, self.told(name)
        return self.folder / name

    def kill(self) -> None:
        """End what is still there."""
        for process in self.started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    found = Runs(tmp_path)
    yield found
    found.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain Python: one process."""
    found = Runs(tmp_path_factory.mktemp("alone"))
    try:
        found.start("out", [sys.executable, TRAIN])
        return found.end("out")
    finally:
        found.kill()


def same_losses(run: Path, alone: Path, launcher_name: str) -> None:
    """The launcher is the one that was meant, and no loss is another than in one process, to 1e-6."""
    assert config(run)["launcher"] == launcher_name
    assert config(run)["world_size"] == 2
    mine, theirs = lines(run), lines(alone)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == [1, 2, 3, 4]
    for one, other in zip(mine, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_torchrun_and_accelerate_and_deepspeed(alone: Path, runs: Runs) -> None:
    """Two of them at once on this host."""
    assert config(alone)["launcher"] == "none"
    runs.start("torchrun", [PROGRAMS / "torchrun", "--standalone", "--nproc_per_node", 2, TRAIN], {}, *DDP)
    accelerate = [PROGRAMS / "accelerate", "launch", "--multi_gpu", "--num_processes", 2]
    accelerate += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    runs.start("accelerate", [*accelerate, "--main_process_port", 0, TRAIN], {}, *DDP)
    same_losses(runs.end("torchrun"), alone, "torchrun")
    same_losses(runs.end("accelerate"), alone, "accelerate")
    runs.start("deepspeed", launcher())
    same_losses(runs.end("deepspeed"), alone, "deepspeed")


def test_two_jobs_of_mpich_at_once(alone: Path, runs: Runs) -> None:
    """Neither meets the other on this host; one is DeepSpeed's engine, on the process group that was made before."""
    words = [mpich(), "-n", 2, sys.executable, TRAIN]
    runs.start("zero", words, ONE_MACHINE)
    runs.start("ddp", words, ONE_MACHINE, *DDP)
    same_losses(runs.end("zero"), alone, "mpirun")
    same_losses(runs.end("ddp"), alone, "mpirun")
    assert config(runs.folder / "zero")["resolved"]["zero_optimization"]["stage"] == 1


def test_open_mpi(alone: Path, runs: Runs) -> None:
    program, variables = open_mpi()
    words = [program, "--map-by", ":OVERSUBSCRIBE", "-n", 2, sys.executable, TRAIN]
    runs.start("zero", words, variables)
    same_losses(runs.end("zero"), alone, "mpirun")


def test_an_mpi_of_another_kind_is_told(runs: Runs) -> None:
    """What mpi4py is linked with does not find the processes of mpirun: each is alone with itself."""
    words = [mpich(), "-n", 2, "env", "-u", "PMI_FD", sys.executable, TRAIN]
    runs.start("out", words, ONE_MACHINE)
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}
    runs.start("open", [sys.executable, TRAIN], variables)
    runs.end("open", status=2)
    assert "than mpirun: mpirun is that of Open MPI" in runs.told("open")
    assert "got: 'MPICH Version:" in runs.told("open")
    out = runs.end("out", status=2)
    told = runs.told("out")
    assert "mpi4py is of another MPI than mpirun: it takes this process for rank 0 of 1" in told, told
    assert "Traceback" not in told
    assert not out.exists()


@pytest.mark.slow
def test_the_ranks_of_mpirun_stop_together(runs: Runs) -> None:
    """SIGUSR1 to one of them: all write a checkpoint, and leave with the status of a run to be queued again."""
    words = [mpich(), "-n", 2, sys.executable, TRAIN]
    long = ("--set", "dsso.train.max_steps=100000", "--set", "dsso.train.eval_interval=100000")
    runs.start("out", words, ONE_MACHINE, *DDP, *long)
    log = runs.folder / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    ranks = [
        process
        for process in psutil.Process(runs.started["out"].pid).children(recursive=True)
        if process.environ().get("PMI_RANK") == "1" and not process.children()
    ]
    ranks[0].send_signal(signal.SIGUSR1)
    out = runs.end("out", status=138)
    assert "--resume auto goes on" in runs.told("out")
    assert len(list((out / "checkpoints").glob("step_*/manifest.json"))) == 1
