"""Tiny runs for the tests: recipes, starting them here or through a launcher, reading what they wrote."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "optimizer": {
        "type": "KFAC",
        "params": {"lr": 0.02, "damping": 0.1, "factor_interval": 2, "inverse_interval": 3},
    },
    "dsso": {
        "model": {"name": "tiny-roberta"},
        "peft": {"type": "adapter", "bottleneck": 8},
        "task": {"name": "builtin", "max_length": 48, "train_examples": 96, "eval_examples": 24},
        "train": {"max_steps": 10, "eval_interval": 5, "log_interval": 2, "save_interval": 4},
    },
}
"""A run of two or three seconds; dropout is on, intervals are such that steps 7 and 9 lie within one."""


def changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values set by dotted path; None removes a key."""
    recipe = copy.deepcopy(recipe)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        home = recipe
        for part in parents:
            home = home.setdefault(part, {})
        if value is None:
            home.pop(last, None)
        else:
            home[last] = value
    return recipe


def write_recipe(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A recipe file: `TINY` with values set by dotted path; None removes a key."""
    recipe = changed(TINY, changes or {})
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`python launch/train.py ARGUMENTS` in this process; returns the exit status."""
    from launch import train as entry

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, arguments)])
    return entry.main()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(*arguments: object, script: str = "launch/train.py", ranks: int = 2) -> list[str]:
    """The command line of DeepSpeed's launcher on this machine, with a port of its own."""
    port = free_port()
    # beside this interpreter: the environment need not be active
    program = Path(sys.executable).parent / "deepspeed"
    head = [program, "--num_gpus", ranks, "--master_port", port, "--master_addr", "127.0.0.1"]
    return [str(word) for word in (*head, ROOT / script, *arguments)]


def lines(run: Path, steps: bool = True) -> list[dict[str, Any]]:
    """Logged steps of a run, or its evaluations; without the clock, and without what differs between ranks."""
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in every if ("eval" not in line) == steps]
    return [{key: value for key, value in line.items() if key not in ("seconds", "ranks")} for line in chosen]


def summary(run: Path) -> dict[str, Any]:
    """`summary.json`."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def config(run: Path) -> dict[str, Any]:
    """`config.json`."""
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints of a run."""
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def partitions(run: Path, step: int = 10) -> dict[str, torch.Tensor]:
    """Weights and moments in a checkpoint, put together: `kind/parameter` to a 1-D tensor."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in (run / "checkpoints" / f"step_{step:08d}" / "dsso").glob("partition_rank*.safetensors"):
        for key, tensor in safetensors.torch.load_file(file).items():
            name, _, start = key.rpartition("@")
            parts.setdefault(name, []).append((int(start), tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(pieces, key=lambda one: one[0])])
        for name, pieces in parts.items()
    }


def interrupted(command: Sequence[str], out: Path) -> tuple[int, str]:
    """Start a run, press Ctrl-C once all ranks are in the loop; its exit status and what it said."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        # A first logged step means that every rank is in the loop; the file alone only that rank 0 has opened it.
        log = out / "metrics.jsonl"
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        told, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, told


def check_interrupted(status: int, told: str, out: Path) -> None:
    """One whole checkpoint is there, and it was said once how to go on."""
    assert status != 0
    assert "SIGINT: writing a checkpoint after this step" in told, told
    assert told.count("--resume auto goes on") == 1
    assert len(checkpoints(out)) == 1
    assert (out / "checkpoints" / checkpoints(out)[0] / "manifest.json").is_file()
