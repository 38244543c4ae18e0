"""Curves of one or several runs in one picture: `python -m dsso.plots RUN… [--out file.png]`.

`python -m dsso.plots functions [--out file.png]` draws the courses of `dsso.plots_functions`; a run in a directory of
that name is asked for as `./functions`.

For every run: training loss against steps and against seconds, the main validation metric, the norm of the
update, the share of clipped steps, the cosine between update and gradient, the damping and the learning rate.
Panels for which no run has figures are left out. A table of the finished runs goes to the standard output and
into the picture.

Colours are those of Okabe and Ito (told apart with every common colour blindness), in an order of falling
contrast; each run has a line style of its own as well, so that a print in grey can be read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsso.errors import DssoError, RecipeError
from dsso.results import Points, Run, name_runs, read_run, rows, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without its yellow, which is too pale for a line on white."""

STYLES: tuple[Any, ...] = ("-", (0, (6, 1.6)), (0, (2.2, 1.2)), (0, (7, 1.6, 1.6, 1.6)))
"""Line styles; they change with every run, so colour and style together tell 28 runs apart."""

FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x_label: str
    curve: Callable[[Run], Points]
    scale: str = "linear"
    """`auto`: logarithmic when positive values span more than a factor of 30; `apart`: when the runs' largest values
    span more than a factor of 10, so that none is a line at the bottom."""
    y_range: tuple[float, float] | None = None
    smooth: bool = False
    marker: str | None = None
    stairs: bool = False
    """Each value holds for the steps before it."""


def panels(metric: str | None) -> list[Panel]:
    """All panels, in reading order."""
    step = "step"
    return [
        Panel("training loss", step, lambda run: run.curve("loss"), "auto", smooth=True),
        Panel("training loss", "seconds", lambda run: run.curve("loss", "seconds"), "auto", smooth=True),
        Panel(f"validation {metric or 'metric'}", step, Run.validation, marker="o"),
        Panel("norm of the update, ‖u‖", step, lambda run: run.curve("update_norm"), "auto", smooth=True),
        Panel("share of clipped steps", step, Run.clip_rate, y_range=(-0.04, 1.04), stairs=True),
        Panel(
            "cos(update, gradient)",
            step,
            lambda run: run.curve("cos_update_grad"),
            y_range=(-0.04, 1.04),
            smooth=True,
        ),
        Panel("damping", step, lambda run: run.curve("damping"), "auto", stairs=True),
        Panel("learning rate", step, lambda run: run.curve("lr"), "apart"),
    ]


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Debiased exponential average over about `span` values; NaN stays NaN and is not averaged."""
    keep = 1.0 - 2.0 / (span + 1.0)
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isnan(value):
            result.append(math.nan)
            continue
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the picture; the runs must have labels.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metric = next((name for run in runs if (name := run.metric())), None)
    shown = [panel for panel in panels(metric) if any(panel.curve(run)[1] for run in runs)]
    table = rows(runs)
    # in the width of a panel; the whole table is on the standard output anyway
    tabled = 2 <= len(table) <= 4 and sum(len(row[0]) for row in table[1:]) <= 30
    cells = len(shown) + tabled
    columns = min(3, cells)
    height = math.ceil(cells / columns)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(4.7 * columns, 3.3 * height + 0.6), dpi=130, layout="constrained")
        axes = list(figure.subplots(height, columns, squeeze=False).flat)
        for panel, axis in zip(shown, axes, strict=False):
            _fill(axis, panel, runs)
        for axis in axes[len(shown) :]:
            axis.axis("off")
        if tabled:
            _draw_table(axes[len(shown)], table, [run.label for run in runs])
        # as many names side by side as fit: a character is about 0.1 inch wide, a line with its gap 1.1 inch
        fitting = int(4.7 * columns / (0.1 * max(len(run.label) for run in runs) + 1.1))
        figure.legend(
            handles=[Line2D([], [], linewidth=1.8, label=run.label, **look(i)) for i, run in enumerate(runs)],
            loc="outside upper center",
            ncols=max(1, min(len(runs), fitting)),
            frameon=False,
            fontsize=12 if len(runs) <= 8 else 9,
            handlelength=3.2,
        )
    return figure


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the run with that index."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}


def _fill(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    absent, finite, largest = [], [], []
    for index, run in enumerate(runs):
        x, y = panel.curve(run)
        line = look(index)
        if not y:
            absent.append(run.label)
        elif panel.smooth and len(y) > 40:
            axis.plot(x, y, color=line["color"], linewidth=0.8, alpha=0.25)
            axis.plot(x, smoothed(y, len(y) // 20), linewidth=1.8, label=run.label, **line)
        else:
            # a lone point has no line to be seen by
            marker = panel.marker or ("o" if len(y) == 1 else None)
            line["drawstyle"] = "steps-pre" if panel.stairs else "default"
            axis.plot(x, y, linewidth=1.8, marker=marker, markersize=4, label=run.label, **line)
        # where a stretch of values that are not finite begins
        gaps = [math.isnan(value) for value in y]
        starts = [gap and not before for before, gap in pairwise([False, *gaps])]
        lost = [at for at, start in zip(x, starts, strict=True) if start and not math.isnan(at)]
        if lost:
            top = axis.get_xaxis_transform()
            axis.plot(lost, [0.97] * len(lost), "x", color=line["color"], transform=top, clip_on=False)
            axis.annotate(
                "× not finite", (0.99, 0.9), xycoords="axes fraction", ha="right", fontsize=8, color="#555555"
            )
        known = [value for value in y if not math.isnan(value)]
        finite += known
        largest += [max(known)] if known and max(known) > 0 else []
    if panel.scale == "apart" and largest and max(largest) > 10 * min(largest):
        # a warm-up begins at zero, which has no place on this axis
        axis.set_yscale("log", nonpositive="mask")
    if panel.scale == "auto" and finite and min(finite) > 0 and max(finite) > 30 * min(finite):
        axis.set_yscale("log")
    if panel.y_range is not None and all(panel.y_range[0] <= value <= panel.y_range[1] for value in finite):
        axis.set_ylim(*panel.y_range)
    elif finite and max(finite) - min(finite) <= 1e-9 * abs(max(finite)):
        # one readable tick for a constant, instead of many that differ in the seventh digit
        pad = 0.1 * abs(finite[0]) or 0.1
        axis.set_ylim(finite[0] - pad, finite[0] + pad)
        axis.set_yticks([finite[0]], [f"{finite[0]:g}"])
    if absent:
        axis.set_title(f"not logged by {', '.join(absent)}", loc="right", fontsize=8, color="#555555")
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(panel.x_label)
    axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_table(axis: Axes, table: Sequence[Sequence[str]], labels: Sequence[str]) -> None:
    # transposed: a column for each run, which stays legible in a narrow cell for two or three runs
    turned = [list(column) for column in zip(*table, strict=True)]
    drawn = axis.table(cellText=turned, cellLoc="right", loc="center", edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1.0, 1.7)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("#BBBBBB")
        if column == 0:
            cell.set_text_props(ha="left")
        elif row == 0:
            colour = COLOURS[labels.index(turned[0][column]) % len(COLOURS)]
            cell.set_text_props(color=colour, fontweight="bold")


def save(runs: Sequence[Run], out: str | Path | None = None) -> Path:
    """Label, draw and write; returns the path of the picture.

    Args:
        runs: at least one.
        out: `.png`, `.pdf` or `.svg`; None writes `curves.png` into the run, or beside several runs.

    Raises:
        RecipeError: a file name of another kind, or a place that cannot be written to.
    """
    if out is None:
        path = runs[0].directory / "curves.png" if len(runs) == 1 else runs[0].directory.parent / "curves.png"
    else:
        path = Path(out)
    check_format(path)
    name_runs(runs)
    write(draw(runs), path)
    return path


def check_format(path: Path, option: str = "--out") -> None:
    """Refuse names of other kinds of files.

    Args:
        path: of a picture.
        option: of the command line, for the message.

    Raises:
        RecipeError: it is none of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise RecipeError("unknown kind of picture", where=option, got=str(path), allowed=FORMATS)


def write(figure: Figure, path: Path, option: str = "--out") -> None:
    """Write a picture, and the directories above it.

    Args:
        figure: drawn.
        path: by its end, the kind of file.
        option: of the command line, for the message.

    Raises:
        RecipeError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise RecipeError(
            f"cannot be written ({error.strerror})",
            where=str(path),
            remedy=f"choose another place with {option}",
        ) from None


def save_functions(out: str | Path = "functions.png") -> Path:
    """Draw the courses over the test functions, print their last values, and write the picture; returns its path.

    Args:
        out: `.png`, `.pdf` or `.svg`.

    Raises:
        RecipeError: matplotlib is not installed, a file name of another kind, or a place that cannot be written to.
    """
    path = Path(out)
    check_format(path)
    need_matplotlib()
    # Not before it is asked for: curves of runs need no torch.
    from dsso import plots_functions

    found = plots_functions.all_courses()
    write(plots_functions.draw(found, look), path)
    print(text_table(plots_functions.table(found)))
    return path


def need_matplotlib() -> None:
    """Say how to install it where it is missing.

    Raises:
        RecipeError: it is.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"plots need {error.name}",
            remedy="in the project's folder: pip install -c constraints.txt -e '.[plots]'",
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dsso.plots", description="Draw the curves of one or several runs."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directory of a run; or the word functions, alone"
    )
    parser.add_argument("--out", help="picture to write (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    try:
        if options.runs == ["functions"]:
            print(f"plot: {save_functions(options.out or 'functions.png')}")
            return 0
        runs = [read_run(directory) for directory in options.runs]
        for warning in (text for run in runs for text in run.warnings):
            print(f"warning: {warning}", file=sys.stderr)
        path = save(runs, options.out)
    except DssoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    table = rows(runs)
    if len(table) > 1:
        print(text_table(table))
    print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
