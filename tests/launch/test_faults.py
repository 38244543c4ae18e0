"""A slice of `python tests/launch/faults.py`: runs that are broken, named, ended, and gone on with exactly."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import faults
from tests.launch.faults import KINDS, Fault, Soak, draw, lacking, tally
from tests.launch.runs import ROOT, train, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    """What undisturbed runs made is kept for all tests."""
    return Soak(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("die", "ddp", "KFAC", "restarts", 1, 5), marks=pytest.mark.slow),
        pytest.param(Fault("raise", "ddp", "KFAC", "torchrun", 0, 6), marks=pytest.mark.slow),
        pytest.param(Fault("mine-readonly", "ddp", "KFAC", "torchrun", 1, 5), marks=pytest.mark.slow),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.launcher}",
)
def test_a_few_faults(fault: Fault, soak: Soak) -> None:
    why = lacking(fault.kind)
    if why is not None:
        pytest.skip(f"{fault.kind}: {why}")
    soak.break_one(fault)
    assert fault.good, f"{fault.line(1)}\n{fault.output}"


def test_an_output_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path), "--output_dir", "/proc/dsso/out") == 2
    told = capsys.readouterr().err
    assert re.search(r"error: output_dir /proc/dsso/out: rank 0 on \S+ cannot write there", told)
    assert "Traceback" not in told


def test_sigterm_does_not_cut_off_a_message_about_an_error() -> None:
    program = """
import os, signal
from launch.train import _terminated

class Unwound:
    def __enter__(self): return self
    def __exit__(self, *error): os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, _terminated)
try:
    with Unwound():
        raise ValueError
except ValueError:
    os.kill(os.getpid(), signal.SIGTERM)
    print("told", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still there", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "told\n"
    assert done.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_soak(tmp_path: Path) -> None:
    assert faults.main(["--faults", "30", "--keep", str(tmp_path)]) == 0


def test_what_is_drawn_is_the_same_for_a_seed_and_shows_every_kind() -> None:
    kinds = list(KINDS)
    first = [draw(number, random.Random(number), kinds) for number in range(len(kinds))]
    again = [draw(number, random.Random(number), kinds) for number in range(len(kinds))]
    assert first == again
    assert [one.kind for one in first] == kinds
    assert all(re.compile(kind.told.format(rank=1, other=0)) for kind in KINDS.values())


def test_a_tally_misses_what_is_missing() -> None:
    good = Fault("die", "ddp", "KFAC", "torchrun", 1, 5, in_time=True, named=True, resumed=True)
    bad = Fault("hang", "ddp", "KFAC", "torchrun", 1, 5, in_time=True, lost=2, orphans=["12 python"])
    assert good.good
    assert not bad.good
    assert tally([good, bad]) == {
        "faults": 2,
        "ended_in_time": 2,
        "named": 1,
        "resumed": 1,
        "steps_lost": 2,
        "orphans": 1,
    }
    assert "NOT NAMED" in bad.line(2)
    assert "2 STEPS LOST" in bad.line(2)
    assert "ORPHANS: 12 python" in bad.line(2)
