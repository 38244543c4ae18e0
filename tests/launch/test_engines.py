"""FSDP2 and DDP on two ranks through torchrun: shipped recipes, going on, ranks that fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.launch.runs import (
    ROOT,
    check_interrupted,
    checkpoints,
    config,
    interrupted,
    lines,
    summary,
    train,
    write_recipe,
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SHIPPED = ROOT / "configs" / "kfac_tiny_t5_lora_zero3.json"
PLAIN = {"dsso.model.dropout": 0.0, "train_batch_size": 16, "gradient_accumulation_steps": "auto"}
"""Nothing random: any number of ranks takes the same steps."""


def words(*arguments: object, script: str = "launch/train.py") -> list[str]:
    """The command line of torchrun with two ranks, on a port that the system chooses."""
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", ROOT / script]
    return [str(word) for word in (*head, *arguments)]


def run(command: Command, recipe: Path, out: Path, engine: str, *more: str, fault: str | None = None) -> Any:
    """A run at two ranks, with a fault or without."""
    script = "launch/train.py" if fault is None else "tests/launch/faulty.py"
    line = words(
        "--ds_config", recipe, "--output_dir", out, "--set", f"dsso.engine={engine}", *more, script=script
    )
    return command(line, env={} if fault is None else {"DSSO_FAULT": fault})


def same(mine: Path, theirs: Path) -> None:
    """Two runs took the same steps, to rounding."""
    for one, other in zip(lines(mine), lines(theirs), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["update_norm"] == pytest.approx(other["update_norm"], rel=1e-2)
    for one, other in zip(lines(mine, False), lines(theirs, False), strict=True):
        assert one["eval"]["metrics"] == pytest.approx(other["eval"]["metrics"], rel=1e-3)


UNEVEN = ("--set", "dsso.task.eval_examples=11")
"""The ranks' shares of the evaluation are of different size."""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe in one process."""
    out = tmp_path_factory.mktemp("engines") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, "--ds_config", SHIPPED, "--output_dir", out, *UNEVEN) == 0
    return out


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_a_shipped_recipe_does_what_one_process_does(
    engine: str, one: Path, tmp_path: Path, command: Command
) -> None:
    done = run(command, SHIPPED, tmp_path / "two", engine, *UNEVEN)
    assert done.returncode == 0, done.stdout + done.stderr
    note = f"note: zero_optimization (stage) is DeepSpeed's and is not used: {engine} "
    assert done.stderr.count(note) == 1
    same(tmp_path / "two", one)
    assert summary(tmp_path / "two")["world_size"] == 2
    assert config(tmp_path / "two")["resolved"]["dsso"]["engine"] == engine
    assert {row["owner"] for row in config(tmp_path / "two")["parameters"]} >= {0, 1}
    assert list((tmp_path / "two" / "adapter").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("fsdp2", "fsdp2"), ("ddp", "ddp"), ("fsdp2", "deepspeed")])
def test_a_signal_to_one_rank_stops_all_and_they_go_on(
    first: str, second: str, tmp_path: Path, command: Command
) -> None:
    recipe, out = write_recipe(tmp_path, PLAIN), tmp_path / "out"
    assert run(command, recipe, tmp_path / "whole", first).returncode == 0
    stopped = run(command, recipe, out, first, fault="term:1:6")
    assert "stopped after step 7; --resume auto goes on" in stopped.stdout, stopped.stdout + stopped.stderr
    assert checkpoints(out)[-1] == "step_00000007"
    done = run(command, recipe, out, second, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    if first == second:
        assert lines(out) == lines(tmp_path / "whole")
        assert lines(out, False) == lines(tmp_path / "whole", False)
    else:
        same(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_bad_losses_on_one_rank_are_skipped_by_all_and_end_the_run(
    engine: str, tmp_path: Path, command: Command
) -> None:
    recipe = write_recipe(tmp_path, PLAIN | {"dsso.train.max_consecutive_skips": 4})
    done = run(command, recipe, tmp_path / "out", engine, fault="nan:1:2")
    assert done.returncode == 1
    told = done.stdout + done.stderr
    assert "step 4: 2 step(s) skipped on all ranks: non-finite loss on rank 1" in told
    assert "4 steps in a row were skipped, the last is step 6 (first: 3)" in told


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_a_rank_that_dies_ends_the_others(engine: str, tmp_path: Path, command: Command) -> None:
    done = run(command, write_recipe(tmp_path, PLAIN), tmp_path / "out", engine, fault="die:1:5")
    assert done.returncode != 0
    # what was written before is whole
    assert checkpoints(tmp_path / "out") == ["step_00000004"]
    assert (tmp_path / "out" / "checkpoints" / "step_00000004" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_ctrl_c_leaves_a_checkpoint(engine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {"dsso.engine": engine, "dsso.train": {"max_steps": 100_000, "eval_interval": 100_000}}
    status, told = interrupted(
        words("--ds_config", write_recipe(tmp_path, changes), "--output_dir", out), out
    )
    check_interrupted(status, told, out)


@pytest.mark.slow
def test_deepspeeds_launcher_starts_them_as_well(tmp_path: Path, command: Command) -> None:
    from tests.launch.runs import launcher

    recipe = write_recipe(tmp_path, PLAIN | {"dsso.engine": "fsdp2", "dsso.train.max_steps": 3})
    done = command(launcher("--ds_config", recipe, "--output_dir", tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "out")["world_size"] == 2
