"""The table of a sweep, and its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsso import plots_sweep
from dsso.errors import RecipeError
from dsso.sweep.format import read
from dsso.sweep.points import Point, points
from dsso.sweep.record import Ending, directory, open_directory, write_ending
from dsso.sweep.table import Table, read_table
from launch import sweep as entry
from tests.sweep.files import LR, TAU, write_sweep

DAMPING = "optimizer.params.damping"


def write_run(out: Path, point: Point, how: Ending, losses: list[float], f1: list[float]) -> None:
    """A run that has ended, a step and a second a line."""
    folder = directory(out, point.name)
    write_ending(folder, point, Ending("started"))
    lines: list[dict[str, Any]] = [
        {"step": 10 * i, "loss": loss, "seconds": float(i)} for i, loss in enumerate(losses, 1)
    ]
    lines += [
        {"step": 10 * i, "eval": {"split": "validation", "step": 10 * i, "metrics": {"f1": v, "loss": 1 - v}}}
        for i, v in enumerate(f1, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if how.state == "finished":
        about = {"main_metric": "f1", "wall_seconds": 2.0 * len(losses), "test": {"f1": max(f1) - 0.1}}
        (folder / "summary.json").write_text(json.dumps(about))
    write_ending(folder, point, how)


def open_sweep(folder: Path, **keys: Any) -> tuple[Path, list[Point]]:
    """A sweep without runs."""
    path, out = write_sweep(folder, **keys), folder / "out"
    sweep = read(path)
    found = points(sweep, path)
    open_directory(out, path, sweep, found)
    return out, found


DONE = Ending("finished", status=0)
LOST = Ending("diverged", "step 40: loss 9 is above 3 times the first one, 1", 143)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four settings at three seeds: all well; one seed diverged; two diverged; one failed, one is missing."""
    out, found = open_sweep(tmp_path, grid={LR: [0.1, 0.2, 0.4, 0.8]}, seeds=[0, 1, 2])
    for point in found:
        lr, seed = point.values[LR], point.seed or 0
        how = DONE
        if (lr, seed) in ((0.2, 2), (0.4, 0), (0.4, 1)):
            how = LOST
        elif (lr, seed) == (0.8, 0):
            how = Ending("failed", "RuntimeError: out of memory", 1)
        elif (lr, seed) == (0.8, 1):
            continue
        losses = [1.0, 0.5 + 0.1 * seed, lr]
        write_run(out, point, how, losses, [0.3, 0.5 + lr + 0.01 * seed, 0.4])
    return out


def test_medians_and_ranges_over_seeds(mixed: Path) -> None:
    found = read_table(mixed, target_loss=0.6)
    assert (found.metric, found.larger_is_better) == ("f1", True)
    by_lr = {one.values[LR]: one for one in found.settings}
    # 0.8 has one seed that counts; 0.4 lost its middle seed and has no place
    assert [one.values[LR] for one in found.settings] == [0.8, 0.2, 0.1, 0.4]
    well, lost, worse, few = by_lr[0.1], by_lr[0.2], by_lr[0.4], by_lr[0.8]
    assert (well.metric.median, well.metric.low, well.metric.high) == pytest.approx((0.61, 0.6, 0.62))
    assert well.train_loss.median == 0.1
    assert (well.steps_to_target, well.seconds) == (20, 6.0)
    assert well.ended == "3 finished"
    # the diverged seed is the worst one, so the middle is the lower of the other two
    assert (lost.metric.median, lost.metric.high) == pytest.approx((0.7, 0.71))
    assert lost.ended == "2 finished, 1 diverged"
    assert worse.metric.median is None
    assert worse.metric.high == pytest.approx(0.92)
    assert worse.steps_to_target is None
    assert few.metric.median == pytest.approx(1.32)
    assert few.ended == "1 finished, 1 failed, 1 missing"
    assert few.steps_to_target is None


def test_other_metrics(mixed: Path) -> None:
    by_loss = read_table(mixed, "train_loss")
    assert not by_loss.larger_is_better
    assert [one.values[LR] for one in by_loss.settings] == [0.1, 0.2, 0.8, 0.4]
    found = read_table(mixed, "loss")
    assert not found.larger_is_better
    assert next(one for one in found.settings if one.values[LR] == 0.1).metric.low == pytest.approx(0.38)
    with pytest.raises(RecipeError, match=r"(?s)--metric.*allowed: f1, loss, train_loss"):
        read_table(mixed, "f2")


def test_an_even_number_of_seeds_with_one_that_diverged_has_no_middle(tmp_path: Path) -> None:
    out, found = open_sweep(tmp_path, grid={LR: [0.1]}, seeds=[0, 1])
    write_run(out, found[0], DONE, [0.5], [0.6])
    write_run(out, found[1], LOST, [9.0], [0.9])
    only = read_table(out).settings[0]
    assert only.metric.median is None
    assert only.metric.low == only.metric.high == 0.6


def test_the_command_prints_it(mixed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["table", str(mixed), "--target_loss", "0.6"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "lr"
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "lr best val. f1 test f1 train loss steps to 0.6 seconds seeds ended"
    assert words[2] == "0.8 1.32 1.22 0.8 - 6 3 1 finished, 1 failed, 1 missing"
    assert words[4] == "0.1 0.61 (0.6..0.62) 0.51 (0.5..0.52) 0.1 20 6 3 3 finished"
    assert words[5].startswith("0.4 - - - ")
    assert "lr=0.8,seed=0: failed: RuntimeError: out of memory" in lines
    assert lines[-1].startswith("best: best validation f1 1.32 with --set optimizer.params.lr=0.8")
    assert entry.main(["table", str(mixed), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["settings"][2]["metric"] == {"median": 0.61, "low": 0.6, "high": 0.62}
    assert told["settings"][3]["runs"][0]["state"] == "diverged"


def test_a_sweep_that_has_not_begun_has_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = open_sweep(tmp_path, grid={LR: [0.1, 0.2]})
    assert entry.main(["table", str(out)]) == 0
    assert "1 missing" in capfd.readouterr().out
    assert entry.main(["table", str(out), "--plot", str(tmp_path / "a.png")]) == 2
    assert "no setting has ended yet" in capfd.readouterr().err


def test_a_run_whose_files_are_damaged_is_left_out(mixed: Path) -> None:
    (directory(mixed, "lr=0.1,seed=0") / "summary.json").write_text("{")
    found = read_table(mixed)
    assert "lr=0.1,seed=0: left out" in found.problems[0]
    well = next(one for one in found.settings if one.values[LR] == 0.1)
    assert (well.metric.median, well.metric.low) == pytest.approx((0.615, 0.61))
    assert well.ended == "2 finished, 1 failed"


def finished(folder: Path, seeds: int = 1, **keys: Any) -> Table:
    """The table of a sweep whose best setting is in the middle, with one setting that diverged."""
    out, found = open_sweep(folder, **keys, seeds=list(range(seeds)))
    for point in found:
        distance = sum(
            (math.log10(value) - middle) ** 2
            for path, middle in ((LR, -1.0), (TAU, 0.0), (DAMPING, -1.5))
            if isinstance(value := point.values.get(path), float)
        )
        f1 = 0.85 - 0.1 * distance + 0.01 * (point.seed or 0)
        how = LOST if point.index % len({p.name.partition(",seed")[0] for p in found}) == 1 else DONE
        write_run(out, point, how, [0.7, 0.1 + distance], [f1])
    return read_table(out)


LRS = {LR: [0.01, 0.05, 0.1, 0.5]}
TAUS = {TAU: [0.1, 1.0, 2.0]}
DAMPINGS = {DAMPING: [0.1, 0.01]}
SPACE = {path: {"log_uniform": [0.01, 1.0]} for path in (LR, TAU, DAMPING, "optimizer.params.damping_floor")}


@pytest.mark.parametrize(
    ("keys", "axes"),
    [
        pytest.param({"grid": LRS}, 1, id="line"),
        pytest.param({"grid": {**LRS, **DAMPINGS, DAMPING: [0.1]}}, 1, id="one-that-varies"),
        pytest.param(
            {"grid": {"optimizer.params.base": [{"type": "AdamW"}, {"type": "SGD"}]}}, 1, id="words"
        ),
        pytest.param({"grid": {**LRS, **TAUS}}, 2, id="map"),
        pytest.param({"grid": {**LRS, **TAUS, **DAMPINGS}}, 3, id="maps"),
        pytest.param({"random": {"samples": 20, "space": SPACE}}, 4, id="draws"),
    ],
)
def test_pictures(keys: dict[str, Any], axes: int, tmp_path: Path) -> None:
    table = finished(tmp_path, 1 if "random" in keys else 3, **keys)
    path = plots_sweep.save(table, tmp_path / "sweep.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    figure = plots_sweep.draw(table)
    assert len(figure.axes) == axes
    words = [text.get_text() for axis in figure.axes for text in axis.texts]
    titles = [axis.get_title(loc="right") for axis in figure.axes]
    assert "× diverged" in [*words, *titles]
    assert "best: " in figure.get_suptitle()


def test_the_map_shows_medians_where_they_belong(tmp_path: Path) -> None:
    table = finished(tmp_path, grid={**LRS, **TAUS})
    axis = plots_sweep.draw(table).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("lr", "tau")
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.01", "0.05", "0.1", "0.5"]
    assert cells[2, 1] == "0.85"
    assert cells[0, 1] == "× diverged"
    frame = axis.patches[0]
    assert (frame.get_x() + 0.47, frame.get_y() + 0.47) == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("name", "words"), [("a.bmp", "--plot: unknown kind of picture"), ("file/a.png", "cannot be written")]
)
def test_pictures_that_cannot_be_made(name: str, words: str, tmp_path: Path) -> None:
    table = finished(tmp_path, grid=LRS)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=words):
        plots_sweep.save(table, tmp_path / name)
    one = finished(tmp_path / "one", grid={LR: [0.1]})
    with pytest.raises(RecipeError, match="only one setting"):
        plots_sweep.save(one, tmp_path / "a.png")
