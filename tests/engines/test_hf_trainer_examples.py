"""The examples of docs/trainer.md, started as the page says: two ranks, and one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.launch.runs import ROOT, launcher

EXAMPLES = ROOT / "docs" / "examples"
ON_CPU = "tests/engines/hf_cpu.py"
"""What lets accelerate run on this machine what a user's GPUs run."""


def history(folder: Path, step: int = 10) -> list[dict[str, float]]:
    """Logged training steps of a run."""
    (state,) = folder.glob(f"runs/*/checkpoint-{step}/trainer_state.json")
    return [line for line in json.loads(state.read_text())["log_history"] if "loss" in line]


def check(words: list[str], tmp_path: Path, command: Command) -> None:
    done = command(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = history(tmp_path)
    assert len(lines) == 5
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["skipped_steps"] == 0
    for part in ("dsso/engine.json", "scheduler.pt"):
        assert list(tmp_path.glob(f"runs/*/checkpoint-5/{part}")), part


def test_the_page_shows_every_example() -> None:
    page = (ROOT / "docs" / "trainer.md").read_text()
    found = sorted(path.name for path in EXAMPLES.glob("trainer_*.py"))
    assert len(found) == 3
    assert all(f"{{literalinclude}} examples/{name}\n" in page for name in found)


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_kfac_with_deepspeed(tmp_path: Path, command: Command) -> None:
    check(launcher(EXAMPLES / "trainer_kfac_deepspeed.py", script=ON_CPU), tmp_path, command)
    adapter = tmp_path / "runs" / "kfac_deepspeed" / "checkpoint-10" / "adapter_model.safetensors"
    assert adapter.is_file()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(240)
def test_kfac_with_fsdp2(tmp_path: Path, command: Command) -> None:
    program = Path(sys.executable).parent / "torchrun"
    words = [
        program,
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / ON_CPU,
        EXAMPLES / "trainer_kfac_fsdp2.py",
    ]
    check([str(word) for word in words], tmp_path, command)


def test_mezo(tmp_path: Path, command: Command) -> None:
    check([sys.executable, str(EXAMPLES / "trainer_mezo.py")], tmp_path, command)
