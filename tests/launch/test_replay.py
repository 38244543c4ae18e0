"""Runs whose weights are made again from the seed log: after a kill, at any step, on other ranks."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsso import replay, seedlog
from tests.launch.runs import ROOT, lines, train
from tests.launch.test_mezo import weights

RECIPE = ROOT / "configs" / "mezo_tiny_roberta_full_single.json"
NEVER = ["--set", "dsso.train.save_interval=1000", "--set", "dsso.train.digest_interval=2"]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, with one checkpoint at the end."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, "--ds_config", RECIPE, "--output_dir", out, *NEVER) == 0
    return out


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """The same weights bit by bit; in a checkpoint names are keys of pieces."""
    plain = {key.removeprefix("weight/").removesuffix("@0"): value for key, value in wanted.items()}
    return found.keys() == plain.keys() and all(
        torch.equal(v.flatten(), plain[n].flatten()) for n, v in found.items()
    )


def record(step: int, measures: list[Any]) -> bytes:
    """A line of the log."""
    return json.dumps({"step": step, "seed": 0, "lr": 0.0005, "measures": measures}).encode() + b"\n"


def unfinished(straight: Path, out: Path, step: int, tail: bytes = b"") -> Path:
    """The run as a kill after some step would have left it: no checkpoint, a log, half a line."""
    out.mkdir()
    shutil.copy(straight / "config.json", out)
    kept = [
        line
        for line in (straight / seedlog.FILE).read_bytes().splitlines(True)
        if json.loads(line)["step"] <= step
    ]
    (out / seedlog.FILE).write_bytes(b"".join(kept) + tail)
    return out


def test_a_run_without_checkpoints_goes_on_exactly(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(straight, tmp_path / "run", 5, b'{"step": 6, "lr')
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", out, "--resume", "auto", *NEVER) == 0
    assert "taking steps 1 to 5 again" in capsys.readouterr().out
    mine, theirs = weights(out), weights(straight)
    assert theirs
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    log = seedlog.read(out / seedlog.FILE)
    assert [record["step"] for record in log.records] == [*range(1, 9)]
    assert [start.step for start in log.starts] == [0, 5]
    assert log.records == seedlog.read(straight / seedlog.FILE).records
    assert lines(out)[-1]["loss"] == lines(straight)[-1]["loss"]


def test_weights_of_any_step(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(straight), "--to", "8"]) == 0
    path = straight / "weights_00000008.safetensors"
    found = load_file(path)
    assert same(found, weights(straight))
    start, middle = tmp_path / "start.safetensors", tmp_path / "middle.safetensors"
    assert replay.main([str(straight), "--to", "0", "--out", str(start)]) == 0
    assert replay.main([str(straight), "--to", "4", "--out", str(middle)]) == 0
    digests = []
    for file in (start, middle, path):
        with safe_open(file, "pt") as archive:
            digests.append(archive.metadata()["digest"])
    log = seedlog.read(straight / seedlog.FILE)
    assert digests == [log.starts[0].digest, log.records[3]["digest"], log.records[7]["digest"]]
    assert len(set(digests)) == 3
    assert "after step 4, digest" in capsys.readouterr().out


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_on_other_ranks(straight: Path, engine: str, tmp_path: Path, command: Command) -> None:
    """A run of one process, made again by two ranks of another engine."""
    out = unfinished(straight, tmp_path / "run", 8)
    config = json.loads((out / "config.json").read_text())
    config["resolved"]["dsso"]["engine"] = engine
    config["resolved"]["zero_optimization"] = {"stage": 3}
    if engine != "deepspeed":
        del config["resolved"]["zero_optimization"]
    (out / "config.json").write_text(json.dumps(config))
    program = Path(sys.executable).parent / "torchrun"
    head = [program, "--standalone", "--nproc_per_node", "2", "-m", "dsso.replay"]
    done = command([*head, out, "--to", "8"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(load_file(out / "weights_00000008.safetensors"), weights(straight))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--to": "9"}, "the log ends before that step"),
        ({"--to": "-1"}, "is no number of steps"),
        ({"line": (3, b'{"step": 3, "lr": 0.\n')}, "line 3"),
        ({"line": (3, b"")}, "the log has steps 3 to 8"),
        ({"line": (4, record(3, [[9.0, 1.0], [9.0, 1.0]]))}, "not those of the run"),
        ({"line": (4, record(3, [[9.0], [9.0]]))}, "the record of step 3 does not fit"),
        ({"line": (4, record(3, ["a"]))}, "the record of step 3 does not fit"),
        ({"resolved": ("model", {"name": "tiny-bert"})}, "written with other trained parameters"),
        ({"resolved": ("train", {"seed": 1, "max_steps": 8})}, "not those that the log goes on from"),
    ],
)
def test_logs_that_cannot_be_used(
    change: Mapping[str, Any], told: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(straight, tmp_path / "run", 8)
    if "line" in change:
        number, line = change["line"]
        every = (out / seedlog.FILE).read_bytes().splitlines(True)
        every[number - 1] = line
        (out / seedlog.FILE).write_bytes(b"".join(every))
    if "resolved" in change:
        config = json.loads((out / "config.json").read_text())
        section, value = change["resolved"]
        config["resolved"]["dsso"][section] = value
        (out / "config.json").write_text(json.dumps(config))
    assert replay.main([str(out), "--to", change.get("--to", "8")]) in (1, 2)
    assert told in capsys.readouterr().err
    assert not (out / "weights_00000008.safetensors").exists()


def test_rounding_is_that_of_the_log(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "run", ROOT / "configs" / "zo_adamu_tiny_roberta_full_bf16_single.json"
    length = ["--set", "dsso.train.max_steps=4", *NEVER]
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, *length) == 0
    shutil.rmtree(out / "checkpoints")
    other = ["--set", "optimizer.params.rounding=stochastic", "--resume", "auto", *NEVER]
    assert train(monkeypatch, "--ds_config", recipe, "--output_dir", out, *other) == 1
    assert "another rounding of 16-bit weights" in capsys.readouterr().err
    # A replay takes what the log says, whatever the run was gone on with.
    config = json.loads((out / "config.json").read_text())
    config["resolved"]["optimizer"]["params"]["rounding"] = "stochastic"
    (out / "config.json").write_text(json.dumps(config))
    assert replay.main([str(out), "--to", "4"]) == 0


@pytest.mark.parametrize(
    "recipe",
    [
        "zo_adam_tiny_roberta_full_single",
        "zo_adamm_tiny_t5_lora_ddp",
        "zo_adamu_tiny_roberta_full_bf16_single",
        "hizoo_tiny_t5_lora_ddp",
    ],
)
def test_methods_with_state_go_on_from_a_log(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--ds_config", ROOT / "configs" / f"{recipe}.json", *NEVER]
    assert train(monkeypatch, *given, "--output_dir", tmp_path / "whole") == 0
    out = unfinished(tmp_path / "whole", tmp_path / "run", 5)
    assert train(monkeypatch, *given, "--output_dir", out, "--resume", "auto") == 0
    mine, theirs = weights(out), weights(tmp_path / "whole")
    assert theirs
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert seedlog.read(out / seedlog.FILE).records == seedlog.read(tmp_path / "whole" / seedlog.FILE).records


def test_a_run_killed_after_its_last_step_is_finished(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its evaluation, its checkpoint and its summary are there, and no evaluation is written twice."""
    out = unfinished(straight, tmp_path / "run", 8)
    kept = [json.dumps(line) for line in lines(straight) if line["step"] <= 4]
    (out / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    seldom = ["--set", "dsso.train.eval_interval=3", *NEVER]
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", out, "--resume", "auto", *seldom) == 0
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in told if line.get("eval", {}).get("split") == "validation"]
    assert evaluated == [3, 6, 8]
    assert (out / "checkpoints" / "step_00000008").is_dir()
    assert weights(out)
    assert json.loads((out / "summary.json").read_text())["steps"] == 8


def test_a_log_that_goes_further_than_a_checkpoint_is_not_cut_unasked(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, often = tmp_path / "run", ["--set", "dsso.train.save_interval=4"]
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", out, *often) == 0
    shutil.rmtree(out / "checkpoints" / "step_00000008")
    early = out / "checkpoints" / "step_00000004"
    before = (out / seedlog.FILE).read_bytes()
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", out, "--resume", early) == 2
    assert "the seed log goes on to step 8 and would be removed" in capsys.readouterr().err
    assert (out / seedlog.FILE).read_bytes() == before
    again = ["--resume", early, "--overwrite", *often]
    assert train(monkeypatch, "--ds_config", RECIPE, "--output_dir", out, *again) == 0


def test_no_log_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(tmp_path), "--to", "1"]) == 1
    assert "there is no seed log" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_at_any_moment(straight: Path, tmp_path: Path) -> None:
    """20 SIGKILLs, each with a continuation: at most the step under way is lost, and the end is the same."""
    out, rng = tmp_path / "run", random.Random(0)
    words = [sys.executable, ROOT / "launch" / "train.py", "--ds_config", RECIPE, "--output_dir", out, *NEVER]
    words += [
        "--resume",
        "auto",
        "--set",
        "dsso.train.log_interval=1",
        "--set",
        "dsso.train.max_steps=400",
        "--set",
        "dsso.train.eval_interval=400",
    ]
    reached = 0
    for turn in range(24):
        process = subprocess.Popen(
            [str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = out / seedlog.FILE
        limit = time.monotonic() + 120
        if turn % 6 == 5:
            time.sleep(rng.random() * 8)  # anywhere: while it starts, or takes steps again
        else:
            while time.monotonic() < limit and not (log.exists() and seedlog.read(log).last > reached):
                time.sleep(0.02)
            time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = seedlog.read(log).last
        assert last >= reached + (turn % 6 != 5)
        # A step is in the log before anything else is told of it, so none of those that were taken is lost.
        told = [
            line for line in (out / "metrics.jsonl").read_bytes().splitlines(True) if line.endswith(b"\n")
        ]
        assert all(json.loads(line)["step"] <= last for line in told)
        reached = last
        if reached >= 400:
            break
    assert replay.main([str(out), "--to", "8", "--out", str(tmp_path / "eight.safetensors")]) == 0
    assert same(load_file(tmp_path / "eight.safetensors"), weights(straight))
    assert replay.main([str(out), "--to", str(reached)]) == 0
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        length = ["--set", f"dsso.train.max_steps={reached}", "--set", "dsso.train.eval_interval=400"]
        assert train(patch, "--ds_config", RECIPE, "--output_dir", whole, *NEVER, *length) == 0
    ours, theirs = seedlog.read(out / seedlog.FILE), seedlog.read(whole / seedlog.FILE)
    assert ours.records[:reached] == theirs.records[:reached]
    assert replay.main([str(whole), "--to", str(reached)]) == 0
    name = f"weights_{reached:08d}.safetensors"
    assert same(load_file(out / name), load_file(whole / name))
