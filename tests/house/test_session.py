"""What `tests/conftest.py` does to a session, seen on a small session of its own."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import Command
from tests.house.files import ROOT

_TESTS = """
import os, random, subprocess, sys

import numpy, pytest, torch


@pytest.mark.slow
def test_long():
    pass


def test_without_data(data_root):
    pass


@pytest.mark.parametrize("again", [1, 2])
def test_seeds(again):
    drawn = (random.random(), float(numpy.random.rand()), float(torch.rand(())))
    assert drawn == test_seeds.__dict__.setdefault("first", drawn)


def test_leaves_a_process():
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    left = subprocess.Popen(words, start_new_session=True)
    open(os.environ["LEFT"], "w").write(str(left.pid))
"""


@pytest.fixture
def session(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_small.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: s\n    gpu: g\n")
    return tmp_path


def gone(pid: int) -> bool:
    """Whether the process has ended, within some seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_skips_are_counted_and_processes_ended(session: Path, command: Command) -> None:
    env = {"LEFT": str(session / "pid"), "DSSO_DATA": ""}
    done = command([sys.executable, "-m", "pytest", "-q", session], env=env, cwd=session)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 2 skipped" in done.stdout
    counted = next(line for line in done.stdout.splitlines() if line.startswith("skips:"))
    assert counted.startswith("skips: 2 (")
    assert "1x slow; run with --slow" in counted
    assert "1x DSSO_DATA is not set" in counted
    pid = int((session / "pid").read_text())
    assert f"left over and killed: {pid}" in done.stdout
    assert gone(pid)


def test_slow_tests_run_on_request(session: Path, command: Command) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "--slow", "-k", "long", session]
    done = command(words, cwd=session)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "skips: 0\n" in done.stdout
    # nothing of this session was taken for a leftover of the inner one
    assert psutil.Process().is_running()


def test_a_command_takes_its_group_along(command: Command, tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"sleep 600 & echo $! > {child}; exit 3"
    assert command(["bash", "-c", f"exec >/dev/null 2>&1; {script}"]).returncode == 3
    assert gone(int(child.read_text()))
