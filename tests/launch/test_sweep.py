"""`launch/sweep.py`: runs are started, watched, stopped, gone on with; what cannot be used is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsso.sweep.record import ending
from launch import sweep as entry
from launch.sweep_run import Busy, Signals, run_point
from tests.conftest import Command
from tests.launch.runs import ROOT
from tests.sweep.files import LR, TAU, write_sweep

Capture = pytest.CaptureFixture[str]
STUB = f"{sys.executable} {ROOT / 'tests/launch/stub.py'}"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.sweep_run.POLL_SECONDS", 0.05)


def sweep(*words: object) -> int:
    """`python launch/sweep.py WORDS` in this process."""
    return entry.main([str(word) for word in words])


def stubbed(path: Path, out: Path, *words: object) -> int:
    """`run` with short runs in the place of real ones."""
    return sweep("run", path, "--out", out, "--launcher", STUB, "--world_size", 1, *words)


def states(out: Path) -> dict[str, str]:
    return {folder.name: ending(folder).state for folder in sorted((out / "points").iterdir())}


def started(out: Path) -> dict[str, int]:
    """How often the run of each point was started."""
    logs = sorted((out / "points").glob("*/run.log"))
    return {log.parent.name: log.read_text().count("stub: lr") for log in logs}


def rule(**keys: Any) -> dict[str, Any]:
    return {"diverged": {"factor": 3.0, "after": 2, **keys}}


def test_points_end_each_in_its_way_and_none_is_repeated(tmp_path: Path, capfd: Capture) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.1, 0.8, 0.9, 0.2]}, **rule()), tmp_path / "out"
    assert stubbed(path, out) == 1
    assert states(out) == {
        "lr=0.1": "finished",
        "lr=0.2": "finished",
        "lr=0.8": "failed",
        "lr=0.9": "diverged",
    }
    told = capfd.readouterr().out
    assert "4 points; 4 to run" in told
    assert "lr=0.8: failed after" in told
    assert "dsso.task.data_dir: there is no such directory" in told
    assert "lr=0.9: diverged after" in told
    # stopped at once, at the first logged loss above three times the first
    assert "step 4: loss 8 is above 3 times the first one, 2" in told
    assert ending(out / "points" / "lr=0.9").status == 143
    assert "1 of 4 points have not come to their end" in told
    # only what failed is tried again
    assert stubbed(path, out) == 1
    assert started(out) == {"lr=0.1": 1, "lr=0.2": 1, "lr=0.8": 2, "lr=0.9": 1}
    assert "4 points, 1 diverged before, 2 finished before; 1 to run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        pytest.param({"diverged": None}, "finished", id="never"),
        pytest.param(rule(factor=None, loss=0.5), "diverged", id="bound"),
        pytest.param(rule(factor=None, loss=0.5, after=10), "finished", id="later"),
        pytest.param(rule(factor=None, loss=0.85, in_a_row=3), "finished", id="too-few"),
        pytest.param(rule(factor=None, loss=0.5, in_a_row=3), "diverged", id="in-a-row"),
    ],
)
def test_a_run_that_ends_between_two_looks_is_judged_the_same(
    keys: dict[str, Any], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.sweep_run.POLL_SECONDS", 30.0)
    out = tmp_path / "out"
    assert stubbed(write_sweep(tmp_path, grid={LR: [0.1]}, **keys), out) == 0
    assert states(out) == {"lr=0.1": state}


def test_one_point_says_all_and_leaves_with_its_status(tmp_path: Path, capfd: Capture) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.1, 0.8, 0.9]}, **rule()), tmp_path / "out"
    assert stubbed(path, out, "--index", 1) == 2
    told = capfd.readouterr().out
    assert "point 1: lr=0.8" in told
    assert "stub: lr 0.8" in told
    assert "got: 'x'" in told
    assert states(out) == {"lr=0.8": "failed"}
    assert stubbed(path, out, "--index", 2) == 0
    assert stubbed(path, out, "--index", 0) == 0
    capfd.readouterr()
    assert stubbed(path, out, "--index", 0) == 0
    assert "point 0: finished before" in capfd.readouterr().out
    assert started(out) == {"lr=0.1": 1, "lr=0.8": 1, "lr=0.9": 1}


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and text in path.read_text()):
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("signum", "index"), [(signal.SIGTERM, ["--index", "0"]), (signal.SIGINT, []), (signal.SIGUSR1, [])]
)
def test_a_signal_reaches_the_run_and_the_same_command_goes_on(
    signum: signal.Signals, index: list[str], tmp_path: Path, capfd: Capture
) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.7, 0.1]}), tmp_path / "out"

    def send() -> None:
        wait_for(out / "points" / "lr=0.7" / "metrics.jsonl", '"step": 5')
        os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    sender = threading.Thread(target=send)
    sender.start()
    assert stubbed(path, out, *index) == 128 + signum
    sender.join()
    assert signal.getsignal(signum) == before
    assert ("the sweep was stopped; the same command goes on" in capfd.readouterr().out) == (not index)
    assert states(out) == {"lr=0.7": "stopped"}
    assert ending(out / "points" / "lr=0.7").reason == f"by {signum.name}"
    assert stubbed(path, out) == 0
    assert states(out) == {"lr=0.1": "finished", "lr=0.7": "finished"}


def test_a_run_whose_time_is_up_ends_the_sweep(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.5, 0.1]}), tmp_path / "out"
    assert stubbed(path, out) == 138
    assert states(out) == {"lr=0.5": "stopped"}
    assert stubbed(path, out, "--index", 0) == 138


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.7, 0.1]}), tmp_path / "out"
    words = [sys.executable, "launch/sweep.py", "run", path, "--out", out, "--launcher", STUB]
    process = subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = out / "points" / "lr=0.7"
    wait_for(folder / "metrics.jsonl", '"step": 5')
    process.kill()
    process.wait()
    assert states(out) == {"lr=0.7": "started"}
    # The run outlives the sweep, and so does its hold on the point.
    assert stubbed(path, out) == 0
    assert states(out) == {"lr=0.1": "finished", "lr=0.7": "started"}
    point = next(one for one in entry.points(entry.read(path), path) if one.name == "lr=0.7")
    with pytest.raises(Busy), Signals() as signals:
        run_point(point, out, [], None, signals)
    assert stubbed(path, out, "--index", 0) == 1
    for run in psutil.process_iter(["cmdline"]):
        if str(folder) in (run.info["cmdline"] or ()):
            run.terminate()
    wait_for(folder / "run.log", "stopped;")
    deadline = time.monotonic() + 30
    while stubbed(path, out, "--index", 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states(out) == {"lr=0.1": "finished", "lr=0.7": "finished"}


def test_a_run_that_does_not_stop_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.sweep_run.GRACE_SECONDS", 0.2)
    path, out = write_sweep(tmp_path, grid={LR: [0.6]}, **rule()), tmp_path / "out"
    assert stubbed(path, out) == 0
    assert states(out) == {"lr=0.6": "diverged"}
    assert ending(out / "points" / "lr=0.6").status == 128 + signal.SIGKILL


def test_ranks_that_outlive_their_launcher_are_waited_for(tmp_path: Path, capfd: Capture) -> None:
    script = tmp_path / "launcher.sh"
    script.write_text(f'echo "port $1"; shift; (sleep 0.3; exec {STUB} "$@") & exit 0\n')
    path, out = write_sweep(tmp_path, grid={LR: [0.1]}), tmp_path / "out"
    words = ["run", path, "--out", out, "--launcher", f"bash {script} {{port}}"]
    assert sweep(*words, "--index", 0) == 0
    assert states(out) == {"lr=0.1": "finished"}
    told = capfd.readouterr().out
    assert re.search(r"^port \d{4,5}$", told, re.MULTILINE)
    assert "stub: lr 0.1" in told


def test_another_sweep_file_is_refused_where_points_differ(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    assert stubbed(write_sweep(tmp_path, grid={LR: [0.1, 0.2]}), out) == 0
    kept = (out / "sweep.json").read_text()
    capfd.readouterr()
    changed = write_sweep(tmp_path, {"optimizer.params.damping": 0.5}, grid={LR: [0.1, 0.2]})
    assert stubbed(changed, out) == 2
    told = capfd.readouterr().err
    assert "lr=0.1: optimizer.params.damping: 0.1 -> 0.5" in told
    assert "remedy: give another --out" in told
    assert stubbed(write_sweep(tmp_path, grid={LR: [0.1]}), out) == 2
    assert "lr=0.2: is not in the sweep file any more" in capfd.readouterr().err
    assert (out / "sweep.json").read_text() == kept
    # More values leave the points that are there as they are, and so does a comment.
    more = write_sweep(tmp_path, {"dsso.comment": "x"}, grid={LR: [0.1, 0.2, 0.3]}, **rule())
    assert stubbed(more, out) == 0
    assert started(out) == {"lr=0.1": 1, "lr=0.2": 1, "lr=0.3": 1}
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 3


def test_check_lists_the_points_and_starts_nothing(tmp_path: Path, capfd: Capture) -> None:
    path, out = write_sweep(tmp_path, grid={LR: [0.1, 0.2], TAU: [1]}, seeds=[0, 1]), tmp_path / "out"
    assert sweep("check", path, "--out", out, "--set", "dsso.train.max_steps=7") == 0
    told = capfd.readouterr().out
    heading, _, *rows = told.split("\n\n")[0].splitlines()
    assert heading.split() == ["index", "lr", "tau", "seed", "state"]
    assert rows[3].split() == ["3", "0.2", "1", "1", "missing"]
    assert "4 points of" in told
    words = f"{path} --out {out} --set dsso.train.max_steps=7"
    assert f"sbatch --array=0-3 launch/slurm/array.sbatch {words}" in told
    assert f"python launch/sweep.py run {words}" in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param([], ["command line", "command"], id="nothing"),
        pytest.param(["run", "SWEEP"], ["--out"], id="no-out"),
        pytest.param(
            ["run", "SWEEP", "--out", "OUT", "--index", "2"], ["--index", "allowed: 0 to 1"], id="index"
        ),
        pytest.param(["run", "SWEEP", "--out", "OUT", "--index", "-1"], ["got: -1"], id="negative"),
        pytest.param(["run", "SWEEP", "--out", "FILE/out"], ["--out: cannot be written"], id="unwritable"),
        pytest.param(["run", "swep.json", "--out", "OUT"], ["there is no such file"], id="no-file"),
        pytest.param(["run", "SWEEP", "--out", "OUT", "--set", "dsso.trian.seed=1"], ["trian"], id="set"),
        pytest.param(
            ["run", "SWEEP", "--out", "OUT", "--launcher", "no-such-program -n 2"],
            ["no-such-program"],
            id="launcher",
        ),
        pytest.param(["check", "SWEEP", "--world_size", "0"], ["--world_size"], id="ranks"),
        pytest.param(["table", "OUT"], ["holds no sweep.json"], id="no-table"),
    ],
)
def test_bad_command_lines(words: list[str], told: list[str], tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").write_text("")
    places = {
        "SWEEP": write_sweep(tmp_path, grid={LR: [0.1, 0.2]}),
        "OUT": tmp_path / "out",
        "FILE/out": tmp_path / "file" / "out",
    }
    assert sweep(*(places.get(word, word) for word in words)) == 2
    err = capfd.readouterr().err
    assert err.startswith("sweep error: ")
    for word in told:
        assert word in err
    assert not (tmp_path / "out").exists()


SHIPPED = ROOT / "configs/sweeps/kfac_tiny_roberta.json"


def test_a_real_run(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    assert sweep("run", SHIPPED, "--out", out, "--index", 0) == 0
    assert "finished after 12 steps" in capfd.readouterr().out
    assert states(out) == {"lr=0.02,seed=0": "finished"}
    assert sweep("table", out, "--json", "--metric", "train_loss") == 0
    best, *others = json.loads(capfd.readouterr().out)["settings"]
    assert best["values"] == {LR: 0.02}
    assert 0.3 < best["train_loss"]["median"] < 1.0
    assert [one["train_loss"]["median"] for one in others] == [None, None]
    # The recipe of a point runs without the sweep.
    recipe = json.loads((out / "points" / "lr=0.02,seed=0" / "recipe.json").read_text())
    assert recipe["dsso"]["train"] == {**recipe["dsso"]["train"], "max_steps": 12, "seed": 0}


def test_a_real_run_that_diverges_is_stopped_with_a_checkpoint(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    longer = ("--set", "dsso.train.eval_interval=1000")
    path = tmp_path / "sweep.json"
    path.write_text(
        SHIPPED.read_text()
        .replace("../", f"{ROOT}/configs/")
        .replace('"dsso.train.max_steps": 12', '"dsso.train.max_steps": 1000')
    )
    assert sweep("run", path, "--out", out, "--index", 2, *longer) == 0
    assert "SIGTERM: writing a checkpoint after this step" in capfd.readouterr().out
    folder = out / "points" / "lr=2,seed=0"
    assert ending(folder).state == "diverged"
    assert ending(folder).status == 143
    assert len(list((folder / "checkpoints").glob("step_*"))) > 0
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_the_shipped_small_sweep_runs(tmp_path: Path, command: Command) -> None:
    out, picture = tmp_path / "out", tmp_path / "sweep.png"
    done = command([sys.executable, "launch/sweep.py", "run", SHIPPED, "--out", out])
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(out) == {
        f"lr={lr},seed={seed}": "diverged" if lr == 2 else "finished"
        for lr in (0.02, 0.2, 2)
        for seed in (0, 1)
    }
    drawn = command([sys.executable, "launch/sweep.py", "table", out, "--plot", picture])
    assert drawn.returncode == 0, drawn.stderr
    assert "2 diverged" in drawn.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
