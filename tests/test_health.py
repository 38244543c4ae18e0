"""How a run is doing, read from its files: `python -m dsso.diagnostics`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso import health
from dsso.diagnostics import Pace, ranks_entry
from dsso.results import read_run


def write(folder: Path, steps: int = 40, every: int = 10, **more: Any) -> Path:
    """A run of three ranks under way, the second of which takes twice the time of the others."""
    folder.mkdir(exist_ok=True)
    ranks = {
        "seconds": [0.5] * 3,
        "busy": [0.2, 0.4, 0.21],
        "bytes": [1_500_000_000] * 3,
        "factor_age": [1.0, 7.0, 3.0],
    }
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(every, steps + 1, every):
            host = {"host": ["a", "b", "b"]} if step == every else {}
            line = {"step": step, "loss": 1 / step, "lr": 0.01, "seconds": step / 2, "clip_events": step / 4}
            line |= {"damping": 0.1, "factor_age": 1.0, "ranks": {**ranks, **host}, **more}
            print(json.dumps(line), file=file)
        figures = {"split": "validation", "step": steps, "metrics": {"accuracy": 0.75}}
        print(json.dumps({"step": steps, "seconds": steps / 2, "eval": figures}), file=file)
    (folder / "config.json").write_text(json.dumps({"optimizer": "KFAC", "world_size": 3, "max_steps": 100}))
    return folder


def told(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What the command prints."""
    assert health.main([str(folder), *more]) == 0
    return capsys.readouterr().out


def test_a_run_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(write(tmp_path / "run"), capsys)
    first, *others = text.splitlines()
    assert first.startswith(f"{tmp_path / 'run'}: KFAC, 3 ranks, under way, last line 0 s ago")
    assert "step 40/100  loss 0.0250  lr 1.00e-02" in others
    assert "clipped 25% of late steps  damping 0.1  factors 1 to 7 steps old" in others
    assert "0.5 s a step  30 s left at this pace" in others
    assert "validation accuracy 0.7500 (step 40), highest 0.7500" in others
    rows = [line.split() for line in others[-3:]]
    assert [row[:7] for row in rows] == [
        ["0", "a", "40", "0.500", "0.200", "1.50", "GB"],
        ["1", "b", "40", "0.500", "0.400", "1.50", "GB"],
        ["2", "b", "40", "0.500", "0.210", "1.50", "GB"],
    ]
    assert others[-2].endswith("slowest: 1.9 times the median")
    assert text.count("slowest") == 1


def test_a_run_that_has_gone_silent_is_suspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run")
    before = time.time() - 400
    os.utime(folder / "metrics.jsonl", (before, before))
    assert "last line 6 min ago (has it ended?" in told(folder, capsys)


def test_an_ended_run_and_one_without_figures_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", ranks=None, skipped_steps=2.0)
    (folder / "summary.json").write_text(json.dumps({"optimizer": "KFAC", "ended": "patience"}))
    text = told(folder, capsys, "--follow")
    assert "ended (patience)" in text
    assert "left at this pace" not in text
    assert "2 steps skipped" in text
    assert "no figures of single ranks" in text


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    text = told(folder, capsys)
    assert "step 40/100" in text
    assert "cut short, left out" in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no such directory"),
        (lambda folder: folder.mkdir(), "not the directory of a run"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").touch()), "holds no line yet"),
    ],
)
def test_what_is_no_run_ends_with_status_2(
    make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    for more in ([], ["--follow"]):
        assert health.main([str(tmp_path / "run"), *more]) == 2
        assert words in capsys.readouterr().err
    assert health.main([str(write(tmp_path / "run")), "--every", "-1"]) == 2
    assert "--every: must be above 0" in capsys.readouterr().err


def test_following_shows_what_is_new_until_the_run_ends(tmp_path: Path) -> None:
    folder, shown = write(tmp_path / "run"), []
    thread = threading.Thread(target=health.follow, args=(folder, 0.05, shown.append))
    thread.start()
    _until(lambda: len(shown) == 1)
    time.sleep(0.3)
    assert len(shown) == 1, "nothing was written meanwhile"
    write(folder, steps=50)
    _until(lambda: "step 50/100" in shown[-1])
    (folder / "summary.json").write_text(json.dumps({"ended": "finished"}))
    thread.join(10)
    assert not thread.is_alive()
    assert "ended (finished)" in shown[-1]


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(120)
def test_control_c_ends_quietly(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "dsso.diagnostics",
        str(write(tmp_path / "run")),
        "--follow",
        "--every",
        "0.1",
    ]
    # What a shell starts in the background ignores Ctrl-C, and so do the processes that it starts in turn.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
    )
    try:
        assert process.stdout is not None
        assert "KFAC, 3 ranks" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, complaints) == (0, "")


def test_the_pace_of_a_rank() -> None:
    pace = Pace(torch.device("cpu"))
    pace.start(4)
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    time.sleep(0.1)
    first = pace.figures(6, {"factor_age": 3.0, "loss_scale": 1.0})
    assert first["busy"] == pytest.approx(0.025, rel=0.5)
    assert first["seconds"] >= 0.07
    assert first["factor_age"] == 3.0
    second = pace.figures(7, {})
    assert second["busy"] < 0.02, "counted once"
    assert "host" in first
    assert "host" not in second, "told once"
    assert ranks_entry([first, first])["busy"] == [first["busy"]] * 2


def test_a_real_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launch.runs import train, write_recipe

    out = tmp_path / "out"
    changes = {"dsso.train.max_steps": 4, "dsso.train.eval_interval": 4}
    assert train(monkeypatch, "--ds_config", write_recipe(tmp_path, changes), "--output_dir", out) == 0
    run = read_run(out)
    assert [set(line["ranks"]) >= {"seconds", "busy", "bytes", "factor_age"} for line in run.steps] == [
        True,
        True,
    ]
    found = health.report(run, time.time())
    assert found.ended
    assert "KFAC, 1 rank, ended (finished)" in found.text
