"""dsso in a Hugging Face Trainer on two ranks, by the real launchers: what it does is what `launch/train.py` does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import hf_worker
from tests.engines.hf_worker import STEPS, Run
from tests.engines.test_hf_trainer import ALONE, MEZO, apart, launched, trained
from tests.launch.runs import ROOT, launcher

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

ZERO_3 = {"zero_optimization.stage": 3}
BY_DEEPSPEED = [
    Run("launch"),
    Run("zero2", how="deepspeed"),
    Run("parts2", how="deepspeed", resume="zero2"),
    Run("zero3", ZERO_3, how="deepspeed"),
    Run("parts3", ZERO_3, how="deepspeed", resume="zero3"),
]
MORE_BY_DEEPSPEED = [
    Run("moved", ZERO_3, how="deepspeed", resume="zero2"),
    Run("sharded", ZERO_3, how="deepspeed", sharded=True),
]
LLAMA = {"zero_optimization": None, "dsso.model.name": "tiny-llama", "dsso.engine": "ddp"}
"""A model that accelerate can cut: none of its weights are tied."""
BY_TORCHRUN = [
    Run("mezo_launch", {**MEZO, "dsso.engine": "ddp"}),
    Run("mezo", MEZO, how="forward"),
]
MORE_BY_TORCHRUN = [
    Run("launch", LLAMA),
    Run("ddp", LLAMA, how="plain"),
    Run("fsdp", LLAMA, how="fsdp"),
    Run("fsdp_parts", LLAMA, how="fsdp", resume="fsdp"),
]


def started(words: list[str]) -> None:
    """A launcher's run, whose process group ends with it."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told, _ = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told[-8000:]


def by_deepspeed(runs: list[Run], out: Path) -> Path:
    started(launcher(hf_worker.write(runs, out), script="tests/engines/hf_worker.py"))
    return out


def by_torchrun(runs: list[Run], out: Path) -> Path:
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--nproc_per_node", 2, "--standalone", ROOT / "tests/engines/hf_worker.py"]
    started([str(word) for word in (*head, hf_worker.write(runs, out))])
    return out


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of `BY_DEEPSPEED` have written."""
    return by_deepspeed(BY_DEEPSPEED, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def more(deepspeed: Path) -> Path:
    """The same, with more runs."""
    return by_deepspeed(MORE_BY_DEEPSPEED, deepspeed)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_launch(deepspeed: Path, stage: int) -> None:
    assert apart(trained(deepspeed, f"zero{stage}"), launched(deepspeed, "launch")) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_the_whole_one(deepspeed: Path, stage: int) -> None:
    mine, whole = trained(deepspeed, f"parts{stage}"), trained(deepspeed, f"zero{stage}")
    assert apart(mine, whole) == 0


def test_two_ranks_move_along_losses_as_launch_does(tmp_path: Path) -> None:
    out = by_torchrun(BY_TORCHRUN, tmp_path)
    assert apart(trained(out, "mezo"), launched(out, "mezo_launch")) < 1e-5


@pytest.mark.slow
def test_another_stage_goes_on(more: Path) -> None:
    assert apart(trained(more, "moved"), trained(more, "zero2")) < 1e-5


@pytest.mark.slow
def test_one_rank_goes_on_where_two_were(deepspeed: Path) -> None:
    runs = [Run("fewer", ALONE, how="plain", resume="zero2")]
    started([sys.executable, "tests/engines/hf_worker.py", str(hf_worker.write(runs, deepspeed))])
    assert apart(trained(deepspeed, "fewer"), trained(deepspeed, "zero2")) < 1e-5


@pytest.mark.slow
def test_a_model_that_was_cut_as_it_was_made_takes_the_same_steps(more: Path) -> None:
    assert apart(trained(more, "sharded"), trained(more, "zero3")) == 0


@pytest.mark.slow
def test_other_engines_equal_launch(tmp_path: Path) -> None:
    out = by_torchrun(MORE_BY_TORCHRUN, tmp_path)
    assert apart(trained(out, "ddp"), launched(out, "launch")) < 1e-5
    assert apart(trained(out, "fsdp"), launched(out, "launch")) < 1e-5
    assert apart(trained(out, "fsdp_parts"), trained(out, "fsdp")) == 0


def test_logs_have_the_figures_of_launch(deepspeed: Path) -> None:
    theirs = [json.loads(line) for line in (deepspeed / "launch" / "metrics.jsonl").read_text().splitlines()]
    theirs = [line for line in theirs if "eval" not in line]
    mine = json.loads((deepspeed / "zero2" / "figures.json").read_text())
    mine = [line for line in mine if "loss" in line]
    assert (
        [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(2, STEPS + 1, 2))
    )
    for one, other in zip(mine, theirs, strict=True):
        for name in ("loss", "update_norm", "cos_update_grad", "clip_scale", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
