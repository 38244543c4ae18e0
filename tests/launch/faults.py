"""Break tiny runs at two ranks in every way, go on, and compare with what an undisturbed run makes.

    python tests/launch/faults.py [--faults 30] [--seed 0] [--only KIND] [--first N]

A line a fault, a tally, and a last line of JSON; exit status 1 where anything is missing. Kinds that need root
(namespaces, mounts) are left out elsewhere, and it is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch

from tests.launch.runs import ROOT, checkpoints, free_port, partitions, write_recipe

MARK = "DSSO_FAULT_RUN"
"""Environment variable that marks every process of a run."""
TIMEOUT = 12.0
"""`dsso.train.timeout_minutes`, in seconds."""
LIMIT = TIMEOUT + 140.0
"""Start and steps on a busy machine, the time-out, the 30 s in which launchers wait for ranks that ignore SIGTERM."""
STEPS = 10

ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization.stage": 1},
    "zero2": {"zero_optimization.stage": 2},
    "zero3": {"zero_optimization.stage": 3},
    "fsdp2": {"dsso.engine": "fsdp2", "zero_optimization": None},
    "ddp": {"dsso.engine": "ddp", "zero_optimization": None},
}
METHODS: dict[str, dict[str, Any]] = {
    "KFAC": {},
    "MeZO": {
        "optimizer": {"type": "MeZO", "params": {"lr": 1e-3, "eps": 1e-3}},
        "dsso.train.digest_interval": 5,
    },
}


@dataclass(frozen=True)
class Kind:
    """One way to break a run."""

    told: str
    """What the output must say; `{rank}` is the broken rank, `{other}` the one that is left."""
    disk: bool = False
    """It needs a file system of its own."""
    network: bool = False
    """It needs a network of its own for each rank."""
    survives: bool = False
    """The run ends well, without going on."""

    @property
    def needs_root(self) -> bool:
        """Whether it is left out for other users."""
        return self.disk or self.network


KINDS: dict[str, Kind] = {
    "die": Kind(r"rank {rank}\b.*(did not answer|has gone)"),
    "stop": Kind(r"rank {rank}\b.*did not answer"),
    "hang": Kind(r"rank {rank} .*(answers, but has been|hangs)"),
    "raise": Kind(r"rank {rank} .*a surprise"),
    "cut": Kind(r"rank {rank}\b.*did not answer", network=True),
    "fill": Kind(r"rank \d: .*(No space left|the disk is full)", disk=True),
    "readonly": Kind(r"rank \d: .*Read-only", disk=True),
    "mine-readonly": Kind(r"rank {rank}: .*Read-only", disk=True),
    "slow": Kind("", survives=True),
}
RESTARTS = ("die", "raise", "hang")
"""Kinds after which `torchrun --max-restarts` brings a run to its end by itself."""


@dataclass
class Fault:
    """One run that is broken, and what came of it."""

    kind: str
    engine: str
    method: str
    launcher: str
    rank: int
    step: int
    seconds: float = 0.0
    in_time: bool = False
    named: bool = False
    resumed: bool = False
    lost: int = 0
    orphans: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def good(self) -> bool:
        """Nothing is missing."""
        return self.in_time and self.named and self.resumed and not self.lost and not self.orphans

    def line(self, number: int) -> str:
        """For the terminal."""
        words = [
            f"{number:3d}  {self.kind:13s} rank {self.rank} step {self.step}  {self.method:4s} {self.engine:5s}"
            f" {self.launcher:9s} {self.seconds:5.1f} s",
            "ended" if self.in_time else "DID NOT END IN TIME",
            "named" if self.named else "NOT NAMED",
            "resumed exactly" if self.resumed else "NOT RESUMED",
        ]
        if self.lost:
            words.append(f"{self.lost} STEPS LOST")
        if self.orphans:
            words.append(f"ORPHANS: {'; '.join(self.orphans)}")
        return "  ".join(words)


def draw(number: int, chance: random.Random, kinds: Sequence[str]) -> Fault:
    """A random fault; kinds take turns, so that few faults show many of them."""
    kind = kinds[number % len(kinds)]
    engine, method = chance.choice(list(ENGINES)), chance.choice(list(METHODS))
    launchers = ["deepspeed", "torchrun"] + (["restarts"] if kind in RESTARTS else [])
    launcher = "plain" if KINDS[kind].network else chance.choice(launchers)
    return Fault(kind, engine, method, launcher, chance.randrange(2), chance.randrange(5, 8))


# -- starting ---------------------------------------------------------------------------------------------------


def command(launcher: str, script: str, *arguments: object) -> list[str]:
    """How a run is started at two ranks on this machine."""
    programs = Path(sys.executable).parent
    if launcher == "deepspeed":
        head = [
            programs / "deepspeed",
            "--num_gpus",
            2,
            "--master_port",
            free_port(),
            "--master_addr",
            "127.0.0.1",
        ]
    else:
        restarts = 2 if launcher == "restarts" else 0
        head = [programs / "torchrun", "--nnodes", 1, "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
        head += [
            "--rdzv_endpoint",
            f"127.0.0.1:{free_port()}",
            "--max-restarts",
            restarts,
            "--monitor-interval",
            "0.2",
        ]
    return [str(word) for word in (*head, ROOT / script, *arguments)]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def run(
    commands: Sequence[tuple[Sequence[str], dict[str, str]]], limit: float
) -> tuple[list[int | None], str, list[str]]:
    """Start processes, wait for all; their exit statuses (None: they had to be killed), output, and what was left."""
    mark = uuid.uuid4().hex
    processes = []
    with tempfile.TemporaryFile("w+") as told:
        for words, more in commands:
            environment = {**os.environ, **more, MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            processes.append(
                subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=environment,
                    stdout=told,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + limit
        try:
            statuses: list[int | None] = []
            for process in processes:
                try:
                    statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
                except subprocess.TimeoutExpired:
                    statuses.append(None)
            # what the launcher has just told to end is given a moment
            patience = time.monotonic() + 2.0
            while (left := marked(mark)) and time.monotonic() < patience:
                time.sleep(0.1)
            orphans = [f"{one.pid} {_words(one)}" for one in left]
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for one in marked(mark):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            for process in processes:
                process.wait()
        told.seek(0)
        return statuses, told.read(), orphans


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80]
    except psutil.Error:
        return "?"


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "dsso-faults", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them, 10.86.0.1 and 10.86.0.2; their names."""
    names = tuple(f"dsso{os.getpid()}{i}" for i in range(2))
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "inside",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "inside",
            "netns",
            names[1],
        )
        for index, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.86.0.{index + 1}/24", "dev", "inside")
            _ip("-n", name, "link", "set", "inside", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def lacking(kind: str) -> str | None:
    """Why a kind cannot be tried here."""
    if not KINDS[kind].needs_root:
        return None
    if os.geteuid() != 0:
        return "needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            if KINDS[kind].disk:
                with disk(Path(folder) / "disk"):
                    pass
            else:
                with networks():
                    pass
        except (OSError, subprocess.CalledProcessError) as error:
            return f"namespaces or mounts are not allowed here ({error})"
    return None


# -- one fault --------------------------------------------------------------------------------------------------


class Soak:
    """Breaks runs; remembers what undisturbed ones made.

    Args:
        folder: for everything that is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def recipe(self, engine: str, method: str) -> Path:
        """A run of a few seconds."""
        place = self.folder / f"{method}-{engine}"
        place.mkdir(exist_ok=True)
        changes = {
            "dsso.model.dropout": 0.0,
            "dsso.train.timeout_minutes": TIMEOUT / 60.0,
            "dsso.train.keep_last": 1,
        }
        changes |= {
            "dsso.train.save_interval": 2,
            "dsso.train.eval_interval": STEPS,
            "dsso.train.max_steps": STEPS,
        }
        return write_recipe(place, {**changes, **METHODS[method], **ENGINES[engine]})

    def whole(self, engine: str, method: str) -> dict[str, torch.Tensor]:
        """What an undisturbed run makes."""
        if (engine, method) not in self._whole:
            recipe = self.recipe(engine, method)
            out = recipe.parent / "whole"
            words = command("torchrun", "launch/train.py", "--ds_config", recipe, "--output_dir", out)
            statuses, told, _ = run([(words, {})], LIMIT)
            if statuses != [0]:
                raise SystemExit(f"an undisturbed run failed: {method}, {engine}\n{told}")
            self._whole[engine, method] = _weights(out)
        return self._whole[engine, method]

    def break_one(self, fault: Fault) -> None:
        """Start a run, break it, look at how it ended, go on, and compare."""
        whole = self.whole(fault.engine, fault.method)
        recipe = self.recipe(fault.engine, fault.method)
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder)))
            if KINDS[fault.kind].disk:
                place = stack.enter_context(disk(place / "disk"))
            out = place / "out"
            self._break(fault, recipe, out, place)
            if fault.kind == "fill":
                (place / "ballast").unlink(missing_ok=True)
            if fault.kind == "readonly":
                subprocess.run(["umount", place], check=True)
            self._go_on(fault, recipe, out, whole)

    def _break(self, fault: Fault, recipe: Path, out: Path, place: Path) -> None:
        kind = KINDS[fault.kind]
        more = {
            "DSSO_FAULT": f"{fault.kind}:{fault.rank}:{fault.step}",
            "DSSO_FAULT_PLACE": str(place),
            "DSSO_FAULT_SECONDS": "0.3",
        }
        arguments = ("--ds_config", recipe, "--output_dir", out, "--resume", "auto")
        begun = time.monotonic()
        if kind.network:
            with networks() as names:
                script = ROOT / "tests/launch/faulty.py"
                commands = [
                    (
                        [
                            "ip",
                            "netns",
                            "exec",
                            names[index],
                            sys.executable,
                            str(script),
                            *map(str, arguments),
                        ],
                        more
                        | {
                            "RANK": str(index),
                            "LOCAL_RANK": str(index),
                            "WORLD_SIZE": "2",
                            "MASTER_ADDR": "10.86.0.1",
                        }
                        | {"MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "inside", "DS_ACCELERATOR": "cpu"},
                    )
                    for index in range(2)
                ]
                statuses, fault.output, fault.orphans = run(commands, LIMIT)
        else:
            words = command(fault.launcher, "tests/launch/faulty.py", *arguments)
            statuses, fault.output, fault.orphans = run([(words, more)], LIMIT)
        fault.seconds = time.monotonic() - begun
        well = kind.survives or fault.launcher == "restarts"
        fault.in_time = all(status is not None and (status == 0) == well for status in statuses)
        pattern = kind.told.format(rank=fault.rank, other=1 - fault.rank)
        fault.named = re.search(pattern, fault.output) is not None

    def _go_on(self, fault: Fault, recipe: Path, out: Path, whole: dict[str, torch.Tensor]) -> None:
        before = checkpoints(out)
        last = int(before[-1].removeprefix("step_")) if before else 0
        if fault.launcher != "restarts" and not KINDS[fault.kind].survives:
            words = command(
                "torchrun", "launch/train.py", "--ds_config", recipe, "--output_dir", out, "--resume", "auto"
            )
            statuses, told, orphans = run([(words, {})], LIMIT)
            fault.output += f"\n---- going on ----\n{told}"
            fault.orphans += orphans
            found = re.search(r"going on from .*\(step (\d+)\)", told)
            fault.lost = max(0, last - (int(found[1]) if found else 0))
            if statuses != [0]:
                return
        mine = _weights(out)
        fault.resumed = mine.keys() == whole.keys() and all(
            torch.equal(mine[name], whole[name]) for name in mine
        )


def _weights(out: Path) -> dict[str, torch.Tensor]:
    every = partitions(out, STEPS) if f"step_{STEPS:08d}" in checkpoints(out) else {}
    return {name: tensor for name, tensor in every.items() if name.startswith("weight/")}


def tally(faults: Sequence[Fault]) -> dict[str, Any]:
    """The figures of a soak."""
    return {
        "faults": len(faults),
        "ended_in_time": sum(one.in_time for one in faults),
        "named": sum(one.named for one in faults),
        "resumed": sum(one.resumed for one in faults),
        "steps_lost": sum(one.lost for one in faults),
        "orphans": sum(len(one.orphans) for one in faults),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=30, help="so many (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--first", type=int, default=0, help="leave out the faults before this one (default: 0)"
    )
    parser.add_argument("--only", choices=[*KINDS], help="one kind alone")
    parser.add_argument(
        "--keep", type=Path, help="folder for the output of faults of which something is missing"
    )
    arguments = parser.parse_args(argv)
    kinds = []
    for kind in [arguments.only] if arguments.only else KINDS:
        why = lacking(kind)
        if why is None:
            kinds.append(kind)
        else:
            print(f"{kind}: left out: {why}")
    if not kinds:
        print("error: no kind of fault can be tried here", file=sys.stderr)
        return 2
    # Ended from outside, it takes its runs with it.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    chance, begun = random.Random(arguments.seed), time.monotonic()
    drawn = [draw(number, chance, kinds) for number in range(arguments.faults)]
    with tempfile.TemporaryDirectory(prefix="dsso-faults-") as folder:
        soak = Soak(Path(folder))
        for number, fault in enumerate(drawn[arguments.first :], arguments.first + 1):
            soak.break_one(fault)
            print(fault.line(number), flush=True)
            if not fault.good and arguments.keep is not None:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"fault{number}.log").write_text(fault.output)
    figures = tally(drawn[arguments.first :])
    count = figures["faults"]
    print(
        f"ended in time {figures['ended_in_time']}/{count}, message names the rank {figures['named']}/{count},"
        f" resumed {figures['resumed']}/{count}, steps lost beyond the last checkpoint {figures['steps_lost']},"
        f" orphans {figures['orphans']}; {time.monotonic() - begun:.0f} s"
    )
    print(json.dumps(figures | {"seconds": round(time.monotonic() - begun, 1)}))
    return 0 if all(fault.good for fault in drawn[arguments.first :]) else 1


if __name__ == "__main__":
    sys.exit(main())
