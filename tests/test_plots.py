"""Reading runs back, the table, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsso import plots, results
from dsso.errors import RecipeError


def write_run(folder: Path, optimizer: str = "KFAC", steps: int = 60, **changes: Any) -> Path:
    """A run of `steps` logged steps; every second one is clipped."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {"step": step, "loss": 1 / step, "lr": 0.1, "seconds": 0.5 * step}
            if optimizer == "KFAC":
                line |= {
                    "update_norm": 2.0,
                    "clip_events": step // 2,
                    "cos_update_grad": 0.3,
                    "damping": 0.01,
                }
            print(json.dumps(line | changes), file=file)
            if step % 20 == 0:
                metrics = {"f1": step / 100, "loss": 1.0}
                print(
                    json.dumps({"eval": {"split": "validation", "step": step, "metrics": metrics}}), file=file
                )
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "optimizer": optimizer,
                "steps": steps,
                "best_metric": 0.6,
                "test_metric": 0.5,
                "train_loss": 1 / 60,
                "wall_seconds": 12.25,
            }
        )
    )
    return folder


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


def test_curves_are_those_of_the_file(tmp_path: Path) -> None:
    run = results.read_run(write_run(tmp_path / "kfac"))
    assert run.optimizer == "KFAC"
    assert run.curve("loss", "seconds")[0][:2] == [0.5, 1.0]
    assert run.curve("loss")[1][:2] == [1.0, 0.5]
    assert run.metric() == "f1"
    assert run.validation() == ([20, 40, 60], [0.2, 0.4, 0.6])
    steps, rates = run.clip_rate()
    assert steps[-1] == 60
    assert sum(rates) / len(rates) == pytest.approx(0.5, abs=0.05)


def test_clip_rate_of_windows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "kfac", steps=1)
    lines = [{"step": 10, "loss": 1.0, "clip_events": 10}, {"step": 20, "loss": 1.0, "clip_events": 10}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert results.read_run(folder).clip_rate() == ([0, 10, 20], [1.0, 1.0, 0.0])


def test_the_picture_has_a_panel_for_every_figure(tmp_path: Path) -> None:
    runs = [results.read_run(write_run(tmp_path / name.lower(), name)) for name in ("AdamW", "KFAC")]
    path = plots.save(runs)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figure = plots.draw(runs)
    assert titles(figure) == [panel.title for panel in plots.panels("f1")]
    loss, seconds = figure.axes[:2]
    assert (loss.get_xlabel(), seconds.get_xlabel()) == ("step", "seconds")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["AdamW", "KFAC"]
    colours = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in loss.get_lines()}
    assert colours["AdamW"] != colours["KFAC"]
    norm = figure.axes[3]
    assert "AdamW" in norm.get_title(loc="right")


def test_panels_without_figures_are_left_out(tmp_path: Path) -> None:
    run = results.read_run(write_run(tmp_path / "adamw", "AdamW"))
    plots.name_runs([run])
    assert titles(plots.draw([run])) == ["training loss", "training loss", "validation f1", "learning rate"]


def test_a_loss_that_is_not_finite_is_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "kfac")
    with (folder / "metrics.jsonl").open("a") as file:
        print('{"step": 61, "loss": NaN, "seconds": 31.0}', file=file)
        print('{"step": 62, "loss": null, "seconds": 31.5}', file=file)
    run = results.read_run(folder)
    assert [math.isnan(value) for value in run.curve("loss")[1][-3:]] == [False, True, True]
    plots.name_runs([run])
    axis = plots.draw([run]).axes[0]
    marks = [line for line in axis.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in marks] == [[61]]


@pytest.mark.parametrize(("steps", "scale"), [(10, "linear"), (60, "log")])
def test_wide_spans_get_a_logarithmic_axis(tmp_path: Path, steps: int, scale: str) -> None:
    run = results.read_run(write_run(tmp_path / "kfac", steps=steps))
    plots.name_runs([run])
    assert plots.draw([run]).axes[0].get_yscale() == scale


def test_smoothing_is_unbiased_and_skips_gaps() -> None:
    assert plots.smoothed([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])
    mixed = plots.smoothed([1.0, math.nan, 3.0], 3)
    assert mixed[0] == pytest.approx(1.0)
    assert math.isnan(mixed[1])
    assert mixed[2] == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = [results.read_run(write_run(tmp_path / name)) for name in ("a/kfac", "b/kfac")]
    runs.append(results.read_run(write_run(tmp_path / "adamw", "AdamW")))
    plots.name_runs(runs)
    assert [run.label for run in runs] == ["KFAC (a/kfac)", "KFAC (b/kfac)", "AdamW"]
    plots.name_runs(runs[:2])
    assert [run.label for run in runs[:2]] == ["a/kfac", "b/kfac"]


def test_command_line_prints_the_table_and_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_run(tmp_path / name.lower(), name)) for name in ("AdamW", "KFAC")]
    assert plots.main([*folders, "--out", str(tmp_path / "pictures" / "both.svg")]) == 0
    table, path = capsys.readouterr().out.rsplit("plot: ", 1)
    heading, _, adamw, kfac = table.strip().splitlines()
    assert " ".join(heading.split()) == "optimizer steps best val. f1 test f1 train loss seconds"
    assert adamw.split()[0] == "AdamW"
    assert kfac.split() == ["KFAC", "60", "0.6000", "0.5000", "0.0167", "12.2"]
    assert Path(path.strip()).read_text().lstrip().startswith("<?xml")


def test_a_run_under_way_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "kfac")
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert plots.main([str(folder)]) == 0
    printed = capsys.readouterr()
    assert "metrics.jsonl line 64: cut short" in printed.err
    assert printed.out == f"plot: {folder / 'curves.png'}\n"


def bad_missing(tmp_path: Path) -> str:
    return str(tmp_path / "nowhere")


def bad_foreign(tmp_path: Path) -> str:
    write_run(tmp_path / "runs" / "kfac")
    return str(tmp_path / "runs")


def bad_empty(tmp_path: Path) -> str:
    folder = write_run(tmp_path / "kfac", steps=0)
    return str(folder)


def bad_middle_line(tmp_path: Path) -> str:
    folder = write_run(tmp_path / "kfac")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:12], *lines[4:]]))
    return str(folder)


def bad_string(path: Path) -> str:
    folder = write_run(path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = '{"loss":"a'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def bad_other_lines(tmp_path: Path) -> str:
    folder = write_run(tmp_path / "kfac")
    (folder / "metrics.jsonl").write_text('{"text": "a", "label": 1}\n')
    return str(folder)


def bad_summary(tmp_path: Path) -> str:
    folder = write_run(tmp_path / "kfac")
    (folder / "summary.json").write_text('{"optimizer": ')
    return str(folder)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (bad_missing, "nowhere: no such directory"),
        (bad_foreign, "did you mean"),
        (bad_empty, "holds no line yet"),
        (bad_middle_line, "metrics.jsonl line 4: is not JSON"),
        (bad_string, "Unterminated string starting at column 9)"),
        (bad_other_lines, "line 1: is not a line of a run"),
        (bad_summary, "summary.json:1:15: is not JSON"),
    ],
)
def test_bad_directories_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, words: str
) -> None:
    assert plots.main([prepare(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "remedy" in message or "allowed" in message


@pytest.mark.parametrize(("other", "scale"), [(0.003, "log"), (0.05, "linear")])
def test_learning_rates_far_apart_have_a_logarithmic_axis(tmp_path: Path, other: float, scale: str) -> None:
    runs = [
        results.read_run(write_run(tmp_path / str(rate), name, lr=rate))
        for name, rate in (("KFAC", 0.2), ("AdamW", other))
    ]
    # a warm-up begins at zero
    runs[0].steps[0]["lr"] = 0.0
    results.name_runs(runs)
    figure = plots.draw(runs)
    axis = next(axis for axis in figure.axes if axis.get_title(loc="left") == "learning rate")
    assert axis.get_yscale() == scale
    figure.canvas.draw()
    if scale == "log":
        assert axis.get_ylim()[0] > other / 10


def test_unknown_kind_of_picture(tmp_path: Path) -> None:
    run = results.read_run(write_run(tmp_path / "kfac"))
    with pytest.raises(RecipeError, match=r"(?s)unknown kind.*allowed: \.png, \.pdf, \.svg"):
        plots.save([run], tmp_path / "curves.bmp")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    run = results.read_run(write_run(tmp_path / "kfac"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        plots.save([run], tmp_path / "file" / "curves.png")
