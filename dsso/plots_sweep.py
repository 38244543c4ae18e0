"""A sweep in one picture: the metric against what was varied, medians over seeds with their ranges.

One variable is a line, two are a heat map, three are heat maps side by side. With more of them, or values that were
drawn, there is a panel for each variable in which every setting is a point. A setting whose middle seed diverged is a
cross.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsso.errors import RecipeError
from dsso.plots import COLOURS, check_format, need_matplotlib, write
from dsso.sweep.format import short_names
from dsso.sweep.table import Setting, Table, number, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#555555"
BEST = COLOURS[1]
_COLUMNS = 3


def save(table: Table, path: Path) -> Path:
    """Draw and write; returns the path.

    Args:
        table: of a sweep.
        path: `.png`, `.pdf` or `.svg`.

    Raises:
        RecipeError: nothing is varied or no setting has ended, a file name of another kind, a place that cannot be
            written to, or matplotlib is not installed.
    """
    check_format(path, "--plot")
    need_matplotlib()
    write(draw(table), path, "--plot")
    return path


def varied(table: Table) -> list[str]:
    """Variables with more than one value, in the order of the sweep file."""
    return [path for path in table.variables if len(_values(table.settings, path)) > 1]


def draw(table: Table) -> Figure:
    """Draw the picture.

    Args:
        table: of a sweep.

    Raises:
        RecipeError: there is nothing to draw.
    """
    from matplotlib import rc_context

    paths = varied(table)
    if not paths:
        raise RecipeError("only one setting is there, which has no axis", where="--plot")
    if all(one.metric.median is None and not _diverged(one) for one in table.settings):
        raise RecipeError("no setting has ended yet", where="--plot", remedy="wait for the first ones")
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with rc_context(style):
        if len(paths) in (2, 3) and not set(table.drawn) & set(paths):
            return _maps(table, paths)
        return _panels(table, paths)


def _values(settings: Sequence[Setting], path: str) -> list[Any]:
    """Values of a variable: numbers by size, others as they come."""
    found = {json.dumps(one.values[path]): one.values[path] for one in settings}
    values = list(found.values())
    return sorted(values) if all(map(_is_number, values)) else values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _diverged(one: Setting) -> int:
    return sum(run.ending.state == "diverged" for run in one.seeds)


def _panels(table: Table, paths: Sequence[str]) -> Figure:
    """A panel for each variable: a line where it is the only one, else a cloud of settings."""
    from matplotlib.figure import Figure

    columns = 2 if len(paths) == 4 else min(_COLUMNS, len(paths))
    rows = math.ceil(len(paths) / columns)
    width = 5.6 if columns == 1 else 4.4 * columns
    figure = Figure(figsize=(width, 3.5 * rows + 0.3), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = short_names(table.variables)
    for index, axis in enumerate(axes):
        if index >= len(paths):
            axis.axis("off")
            continue
        _against(axis, table, paths[index], line=len(paths) == 1)
        axis.set_xlabel(names[paths[index]])
        if index % columns == 0:
            axis.set_ylabel(_capital(table.title))
    _title(figure, table)
    return figure


def _against(axis: Axes, table: Table, path: str, line: bool) -> None:
    values = _values(table.settings, path)
    numbers = all(map(_is_number, values))
    place = {json.dumps(value): float(value) if numbers else float(i) for i, value in enumerate(values)}
    if numbers and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_xscale("log")
    if not numbers:
        axis.set_xticks(range(len(values)), [shown(value) for value in values])
        axis.set_xlim(-0.5, len(values) - 0.5)
    elif len(values) <= 6:
        axis.set_xticks([float(value) for value in values], [shown(value) for value in values])
        axis.minorticks_off()
    known = [one for one in table.settings if one.metric.median is not None]
    known.sort(key=lambda one: place[json.dumps(one.values[path])])
    x = [place[json.dumps(one.values[path])] for one in known]
    y = [one.metric.median or 0.0 for one in known]
    below = [value - (one.metric.low or 0.0) for one, value in zip(known, y, strict=True)]
    above = [(one.metric.high or 0.0) - value for one, value in zip(known, y, strict=True)]
    # the median of seeds of which some diverged may lie outside the range of the others
    bars = [[max(0.0, value) for value in side] for side in (below, above)]
    if line:
        _line(axis, table, path, place)
    axis.errorbar(
        x,
        y,
        bars,
        color=COLOURS[0],
        linestyle="none",
        elinewidth=1.0,
        marker="o",
        markersize=5 if line else 4,
        capsize=3 if line else 0,
    )
    lost = [
        place[json.dumps(one.values[path])] for one in table.settings if one not in known and _diverged(one)
    ]
    if lost:
        height = 0.03 if table.larger_is_better else 0.97
        where = axis.get_xaxis_transform()
        axis.plot(lost, [height] * len(lost), "x", color=BEST, transform=where, clip_on=False, zorder=5)
        axis.set_title("× diverged", loc="right", fontsize=8, color=GREY)
    if not table.larger_is_better and y and min(y) > 0 and max(y) > 30 * min(y):
        axis.set_yscale("log")
    if known:
        axis.plot(
            *_point(known[y.index(_best(table, y))], path, place),
            "o",
            markersize=10,
            fillstyle="none",
            color=BEST,
        )
    axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _line(axis: Axes, table: Table, path: str, place: dict[str, float]) -> None:
    """Through the medians, with a gap where a setting has none."""
    every = sorted((place[json.dumps(one.values[path])], one.metric.median) for one in table.settings)
    heights = [math.nan if value is None else value for _, value in every]
    axis.plot([x for x, _ in every], heights, color=COLOURS[0], linewidth=1.8)


def _point(one: Setting, path: str, place: dict[str, float]) -> tuple[float, float]:
    return place[json.dumps(one.values[path])], one.metric.median or 0.0


def _best(table: Table, values: Sequence[float]) -> float:
    return max(values) if table.larger_is_better else min(values)


def _maps(table: Table, paths: Sequence[str]) -> Figure:
    """Heat maps over two variables; the third one, that with the fewest values, is a panel for each value."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    sizes = {path: len(_values(table.settings, path)) for path in paths}
    third = min(paths, key=lambda path: sizes[path]) if len(paths) == 3 else None
    x, y = sorted((path for path in paths if path != third), key=lambda path: -sizes[path])
    panels = [None] if third is None else _values(table.settings, third)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    cell = 0.95
    width = columns * (cell * sizes[x] + 0.9) + 1.3
    height = rows * (0.62 * cell * sizes[y] + 1.0) + 0.5
    figure = Figure(figsize=(max(width, 4.8), max(height, 2.6)), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    known = [one.metric.median for one in table.settings if one.metric.median is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    wide = not table.larger_is_better and low > 0 and high > 30 * low
    norm = LogNorm(low, high) if wide else Normalize(low, high if high > low else low + 1e-9)
    names = short_names(table.variables)
    images = []
    for index, axis in enumerate(axes):
        if index >= len(panels):
            axis.axis("off")
            continue
        shown_here = [one for one in table.settings if third is None or one.values[third] == panels[index]]
        images.append(_map(axis, table, shown_here, x, y, norm, _best(table, known) if known else None))
        axis.set_xlabel(names[x])
        axis.set_ylabel(names[y] if index % columns == 0 else "")
        if third is not None:
            axis.set_title(f"{names[third]} = {shown(panels[index])}", loc="left", fontsize=10)
    figure.colorbar(images[-1], ax=axes, label=_capital(table.title), shrink=0.9)
    _title(figure, table)
    return figure


def _map(
    axis: Axes, table: Table, settings: Sequence[Setting], x: str, y: str, norm: Any, best: float | None
) -> Any:
    columns, rows = _values(table.settings, x), _values(table.settings, y)
    by_place = {(json.dumps(one.values[x]), json.dumps(one.values[y])): one for one in settings}
    cells = [[by_place.get((json.dumps(a), json.dumps(b))) for a in columns] for b in rows]
    heights = [
        [math.nan if one is None or one.metric.median is None else one.metric.median for one in row]
        for row in cells
    ]
    colours = "viridis" if table.larger_is_better else "viridis_r"
    image = axis.imshow(heights, cmap=colours, norm=norm, origin="lower", aspect="auto")
    axis.set_facecolor("#EEEEEE")
    for i, row in enumerate(cells):
        for j, one in enumerate(row):
            text = _cell(one)
            colour = GREY
            if one is not None and one.metric.median is not None:
                red, green, blue, _ = image.cmap(norm(one.metric.median))
                colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
                if one.metric.median == best:
                    _frame(axis, i, j)
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour, linespacing=1.3)
    axis.set_xticks(range(len(columns)), [shown(value) for value in columns])
    axis.set_yticks(range(len(rows)), [shown(value) for value in rows])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _frame(axis: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    place = (column - 0.47, row - 0.47)
    axis.add_patch(Rectangle(place, 0.94, 0.94, fill=False, edgecolor=BEST, linewidth=2.5))


def _cell(one: Setting | None) -> str:
    """What a cell says: the median, the range below it, and how many seeds diverged."""
    if one is None:
        return "–"
    lost = _diverged(one)
    if one.metric.median is None:
        return "× diverged" if lost else "–"
    lines = [f"{one.metric.median:.3g}"]
    if one.metric.low != one.metric.high and one.metric.low is not None and one.metric.high is not None:
        lines.append(f"{one.metric.low:.3g}–{one.metric.high:.3g}")
    if lost:
        lines.append(f"× {lost} of {len(one.seeds)}")
    return "\n".join(lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(figure: Figure, table: Table) -> None:
    most = max(len(one.seeds) for one in table.settings)
    over = "" if most == 1 else f"; medians over {most} seeds and their range"
    best = next((one for one in table.settings if one.metric.median is not None), None)
    names = short_names(table.variables)
    told = ""
    if best is not None:
        values = ", ".join(f"{names[path]} {shown(best.values[path])}" for path in varied(table))
        told = f"best: {number(best.metric.median)} at {values}"
    figure.suptitle(f"{told}{over}".removeprefix("; "), fontsize=9, color=GREY)
