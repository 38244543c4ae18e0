"""Two ranks through DeepSpeed's own launcher: results, resuming, refusals, ranks that fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso.engines.quiet import IRRELEVANT
from tests.conftest import Command
from tests.launch.runs import (
    ROOT,
    check_interrupted,
    checkpoints,
    config,
    interrupted,
    launcher,
    lines,
    partitions,
    summary,
    write_recipe,
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

PLAIN = {"dsso.model.dropout": 0.0, "train_batch_size": 16, "gradient_accumulation_steps": "auto"}
"""The same global batch at any number of ranks, and nothing random: one rank and two take the same steps."""


def run(command: Command, recipe: Path, out: Path, *more: str, fault: str | None = None) -> Any:
    """A run at two ranks, with a fault or without."""
    script = "launch/train.py" if fault is None else "tests/launch/faulty.py"
    words = launcher("--ds_config", recipe, "--output_dir", out, *more, script=script)
    return command(words, env={} if fault is None else {"DSSO_FAULT": fault})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run at two ranks."""
    folder = tmp_path_factory.mktemp("launcher")
    words = launcher("--ds_config", write_recipe(folder, PLAIN), "--output_dir", folder / "out")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "told").write_text(done.stdout + done.stderr)
    return folder / "out"


def test_a_healthy_run_draws_no_alarm(whole: Path) -> None:
    # what comes before is said by the launcher's own processes
    told = (whole.parent / "told").read_text().rpartition("spawned with command")[2]
    assert "finished after 10 steps" in told
    for part in IRRELEVANT:
        assert part not in told
    assert "Loading weights" not in told


def test_two_ranks_do_what_one_does(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launch.runs import train

    recipe = write_recipe(tmp_path, PLAIN)
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "one") == 0
    assert summary(whole)["world_size"] == 2
    assert config(whole)["launcher"] == "deepspeed"
    assert {row["owner"] for row in config(whole)["parameters"]} >= {0, 1}
    for mine, theirs in zip(lines(whole), lines(tmp_path / "one"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-2)
    for mine, theirs in zip(lines(whole, False), lines(tmp_path / "one", False), strict=True):
        assert mine["eval"]["metrics"] == pytest.approx(theirs["eval"]["metrics"], rel=1e-3)
    assert summary(whole)["state_bytes"] < summary(whole)["state_bytes_all_ranks"]


def difference(mine: Path, theirs: Path) -> float:
    """Distance of the weights at the end of two runs, over what the last two steps made of them.

    A relative difference of each parameter means little here: biases that were zero are nothing but a few updates.
    """
    ours, others, before = partitions(mine), partitions(theirs), partitions(theirs, 8)
    assert ours.keys() == others.keys()
    names = [name for name in ours if name.startswith("weight/")]
    apart, moved = (
        torch.cat([ours[name] - others[name] for name in names]).norm(),
        torch.cat([before[name] - others[name] for name in names]).norm(),
    )
    return float(apart / moved)


def same_course(mine: Path, theirs: Path) -> None:
    """The logged steps and evaluations of `mine` are those of `theirs` from some step on, to rounding."""
    for steps in (True, False):
        ours = lines(mine, steps)
        for one, other in zip(ours, lines(theirs, steps)[-len(ours) :], strict=True):
            assert one["step"] == other["step"]
            if steps:
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            else:
                assert one["eval"]["metrics"] == pytest.approx(other["eval"]["metrics"], rel=1e-4)


def test_a_signal_to_one_rank_stops_all_and_they_go_on_exactly(
    whole: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from tests.launch.runs import train

    recipe, out = write_recipe(tmp_path, PLAIN), tmp_path / "out"
    stopped = run(command, recipe, out, fault="term:1:6")
    assert "stopped after step 7; --resume auto goes on" in stopped.stdout
    assert stopped.returncode == 143
    assert checkpoints(out)[-1] == "step_00000007"
    assert not (out / "summary.json").exists()
    # One process goes on elsewhere with what two have written in the middle of a logging interval.
    source, alone = out / "checkpoints" / "step_00000007", tmp_path / "alone"
    arguments = ("--ds_config", recipe, "--output_dir", alone, "--resume", source)
    assert train(monkeypatch, *arguments) == 0
    told = capfd.readouterr().out
    assert "step_00000007: written by 2 ranks (ZeRO 1), goes on with 1 rank (single): to rounding" in told
    assert [line["step"] for line in lines(alone)] == [8, 10]
    same_course(alone, whole)
    assert difference(alone, whole) <= 1e-4
    # And so do the two themselves.
    assert run(command, recipe, out, "--resume", "auto").returncode == 0
    assert lines(out) == lines(whole)
    assert lines(out, steps=False) == lines(whole, steps=False)
    mine, theirs = partitions(out), partitions(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_a_signal_to_the_launcher_leaves_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, {"dsso.train": {"max_steps": 100_000, "eval_interval": 100_000}})
    status, told = interrupted(launcher("--ds_config", recipe, "--output_dir", out), out)
    check_interrupted(status, told, out)


def test_a_bad_recipe_is_told_once_with_status_2(tmp_path: Path, command: Command) -> None:
    recipe = write_recipe(tmp_path, {"optimizer.params.dampin": 1})
    done = run(command, recipe, tmp_path / "out")
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert told.count("optimizer.params.dampin: unknown key") == 1
    assert "nearest: 'damping'" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_rank_that_dies_ends_the_others(tmp_path: Path, command: Command) -> None:
    done = run(command, write_recipe(tmp_path, PLAIN), tmp_path / "out", fault="die:1:5")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "rank 0: another rank has ended, or did not answer within dsso.train.timeout_minutes" in told, told
    assert "rank 1 did not answer: last heard of " in told
    assert "which has gone: killed from outside" in told
    newest = tmp_path / "out" / "checkpoints" / "step_00000004"
    assert f"remedy: --resume auto goes on from {newest}" in told
    error = next(
        line for line in told.splitlines() if line.startswith(("RuntimeError: ", "torch.distributed"))
    )
    assert told.count(error.partition(": ")[2][:60]) == 1, "the traceback has it"
    # what was written before is whole
    assert checkpoints(tmp_path / "out") == ["step_00000004"]
    assert [line["step"] for line in lines(tmp_path / "out")] == [2, 4]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_within_the_time_out(tmp_path: Path, command: Command) -> None:
    recipe = write_recipe(tmp_path, PLAIN | {"dsso.train.timeout_minutes": 0.1})
    done = run(command, recipe, tmp_path / "out", fault="hang:1:5")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "rank 0: another rank has ended, or did not answer within dsso.train.timeout_minutes" in told, told
    assert "answers, but has been in step 6 for" in told
    assert "launch/faulty.py" in told.partition("answers, but")[2].partition("\n")[0], "where it hangs"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die-refresh:1:3", "stop-refresh:1:3", "stop-statistics:1:3"])
def test_a_rank_that_stops_in_the_middle_of_a_refresh_ends_the_others(
    fault: str, tmp_path: Path, command: Command
) -> None:
    """The exchange of statistics has a process group of its own; its waits have an end as well."""
    recipe = write_recipe(tmp_path, PLAIN | {"dsso.train.timeout_minutes": 0.1})
    done = run(command, recipe, tmp_path / "out", fault=fault)
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "rank 0: another rank has ended, or did not answer within dsso.train.timeout_minutes" in told, told


@pytest.mark.slow
def test_an_unforeseen_error_names_the_rank(tmp_path: Path, command: Command) -> None:
    done = run(command, write_recipe(tmp_path, PLAIN), tmp_path / "out", fault="raise:1:3")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "rank 1 of 2 ends: ValueError: a surprise" in told
    assert "Traceback" in told


def test_bad_losses_on_one_rank_are_skipped_by_all_and_end_the_run(tmp_path: Path, command: Command) -> None:
    recipe = write_recipe(tmp_path, PLAIN | {"dsso.train.max_consecutive_skips": 4})
    done = run(command, recipe, tmp_path / "out", fault="nan:1:2")
    assert done.returncode == 1
    told = done.stdout + done.stderr
    assert (
        "step 4: 2 step(s) skipped on all ranks: non-finite loss on rank 1 (4 micro-batches); 2 in all"
        in told
    )
    assert "4 steps in a row were skipped, the last is step 6 (first: 3)" in told
    assert "the loss was not finite on rank 1" in told
    assert told.count("remedy: lower the learning rate") == 1


@pytest.mark.slow
def test_a_full_disk_on_one_rank_is_told_by_all(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    done = run(command, write_recipe(tmp_path, PLAIN), out, fault="full:1:8")
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "step_00000008 could not be written (rank 1: the disk is full" in told
    assert "the last good one is" in told
    assert checkpoints(out) == ["step_00000004", "step_00000010"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_goes_on_exactly(
    stage: int, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, PLAIN | {"zero_optimization.stage": stage})
    assert run(command, recipe, tmp_path / "whole").returncode == 0
    assert run(command, recipe, tmp_path / "out", fault="term:0:6").returncode == 143
    assert run(command, recipe, tmp_path / "out", "--resume", "auto").returncode == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    assert lines(tmp_path / "out", False) == lines(tmp_path / "whole", False)
    # the best weights are put back into shards for the test: compared with a run that has none
    from tests.launch.runs import train

    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", tmp_path / "one") == 0
    for mine, theirs in zip(lines(tmp_path / "out", False), lines(tmp_path / "one", False), strict=True):
        assert mine["eval"]["metrics"] == pytest.approx(theirs["eval"]["metrics"], rel=1e-3)
    assert summary(tmp_path / "out")["best_step"] == summary(tmp_path / "one")["best_step"]


@pytest.mark.slow
def test_one_rank_then_two_on_another_stage(
    whole: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.launch.runs import train

    out = tmp_path / "out"
    short = write_recipe(tmp_path, PLAIN)
    assert (
        train(monkeypatch, "--ds_config", short, "--output_dir", out, "--set", "dsso.train.max_steps=5") == 0
    )
    recipe = write_recipe(tmp_path, PLAIN | {"zero_optimization.stage": 3})
    done = run(command, recipe, out, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written by 1 rank (single), goes on with 2 ranks (ZeRO 3)" in done.stdout
    assert summary(out)["steps"] == 10
    assert difference(out, whole) <= 1e-4


@pytest.mark.slow
def test_torchrun_and_tensorboard(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("tensorboard")
    board = {"enabled": True, "output_path": str(tmp_path / "board"), "job_name": "tiny"}
    recipe = write_recipe(tmp_path, PLAIN | {"tensorboard": board, "dsso.train.max_steps": 3})
    program = Path(sys.executable).parent / "torchrun"
    words = [program, "--standalone", "--nproc_per_node", "2", ROOT / "launch/train.py"]
    done = command([*words, "--ds_config", recipe, "--output_dir", tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "out")["world_size"] == 2
    assert list((tmp_path / "board" / "tiny").glob("events.out.tfevents.*"))
