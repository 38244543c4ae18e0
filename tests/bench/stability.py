"""What "diverged", "spiked" and "learned" mean, fixed before any run was looked at; tables and figure.

With L the loss of a batch, L_const the loss of the best constant prediction on the training data (entropy of the
classes, variance of the values) and L_ref = max(L_const, loss of the first batch, taken before any update):

- **diverged**: a loss that is not finite, or the mean of the last 10 losses above 2 L_ref
- **spiked**: a step whose loss is above twice the median of the 10 losses before it, and above L_const. The second
  condition keeps the noise of small batches at a low loss out.
- **learned**: the mean of the last 10 losses below 0.9 L_const. What neither diverged nor learned has stalled.

A run may have spiked and learned, or spiked and diverged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, pvariance
from typing import Any

DIVERGED, SPIKE, LEARNED, SPAN = 2.0, 2.0, 0.9, 10

Line = dict[str, Any]
"""A line of the results file."""


def constant_loss(labels: Sequence[float], kind: str) -> float:
    """Loss of the best constant prediction, in the units of `kind`: nats or squared label units."""
    if kind == "mse":
        return pvariance(labels)
    return -sum(n / len(labels) * math.log(n / len(labels)) for n in Counter(labels).values())


def spikes(losses: Sequence[float | None], constant: float) -> list[int]:
    """Steps that spiked; a loss of None is not finite, and counts."""
    found = []
    for step in range(1, len(losses)):
        loss = losses[step]
        before = [one for one in losses[max(0, step - SPAN) : step] if one is not None]
        if loss is None or (before and loss > SPIKE * median(before) and loss > constant):
            found.append(step)
    return found


def verdict(line: Line) -> dict[str, Any]:
    """How a run ended, by the definitions above."""
    losses, constant = line["curves"]["loss"], line["constant_loss"]
    good = [loss for loss in losses if loss is not None]
    reference = max(constant, losses[0] if losses[0] is not None else constant)
    last = [loss for loss in losses[-SPAN:] if loss is not None]
    end = fmean(last) if last else math.inf
    diverged = len(good) < len(losses) or end > DIVERGED * reference
    return {
        "diverged": diverged,
        "spikes": len(spikes(losses, constant)),
        "learned": not diverged and end < LEARNED * constant,
        "start": losses[0],
        "end": end,
        "highest": max(good, default=math.inf),
        "longest_step": max((x for x in line["curves"]["step_length"] if x is not None), default=math.inf),
        "clipped": fmean(line["curves"]["clipped"]),
        "cos": median(x for x in line["curves"]["cos"] if x is not None),
    }


def outcome(found: dict[str, Any]) -> str:
    """A verdict in words."""
    base = "diverged" if found["diverged"] else "learned" if found["learned"] else "stalled"
    return f"{base}, {found['spikes']} spikes" if found["spikes"] else base


def order(line: Line) -> tuple[Any, ...]:
    """Sorts lines for tables: by task, scale, mode, learning rate and norm."""
    case = line["case"]
    modes = ("none", "pre", "post")
    return case["task"], case["sense"], modes.index(case["clip"]), case["lr"], case["tau"]


HEAD = (
    "task",
    "damping",
    "clip",
    "lr",
    "tau",
    "first",
    "highest",
    "last 10",
    "longest step",
    "clipped",
    "outcome",
)


def row(line: Line) -> tuple[str, ...]:
    """A line of the table."""
    case, found = line["case"], verdict(line)
    return (
        case["task"],
        case["sense"] if case["damping"] is None else f"{case['sense']} {case['damping']:g}",
        case["clip"],
        f"{case['lr']:g}",
        "" if case["clip"] == "none" else f"{case['tau']:g}",
        *(f"{found[name]:.3g}" for name in ("start", "highest", "end", "longest_step")),
        f"{found['clipped']:.0%}",
        outcome(found),
    )


def table(lines: Sequence[Line]) -> str:
    """All runs as a Markdown table, and the constant prediction's loss of each task."""
    rows = [HEAD, *(row(line) for line in sorted(lines, key=order))]
    widths = [max(len(one[column]) for one in rows) for column in range(len(HEAD))]
    written = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(one, widths, strict=True)) + " |"
        for one in rows
    ]
    written.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    constants = {line["case"]["task"]: line["constant_loss"] for line in lines}
    written += ["", *(f"constant prediction, {task}: {loss:.4g}" for task, loss in sorted(constants.items()))]
    return "\n".join(written)


def describe(line: Line) -> str:
    """One finished run, for the terminal."""
    return f"{'  '.join(row(line))}  {line['seconds']:.0f} s"


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Counts by scale of the damping and mode."""
    counts: dict[str, Any] = {}
    for line in sorted(lines, key=order):
        case, found = line["case"], verdict(line)
        entry = counts.setdefault(
            f"{case['sense']}/{case['clip']}", {"runs": 0, "diverged": 0, "spiked": 0, "learned": 0}
        )
        entry["runs"] += 1
        entry["diverged"] += found["diverged"]
        entry["spiked"] += bool(found["spikes"])
        entry["learned"] += found["learned"]
    return counts


# -- the figure -------------------------------------------------------------------------------------------------

MODE_LOOK = {"none": ("#D55E00", "-"), "pre": ("#E69F00", (0, (6, 1.6))), "post": ("#0072B2", "-")}
LR_COLOURS = ("#56B4E9", "#009E73", "#CC79A7", "#000000")
TAU_STYLES: tuple[Any, ...] = ((0, (1.4, 1.2)), (0, (5, 1.5)), "-")


def draw(lines: Sequence[Line], path: Path) -> None:
    """A row a task: loss of the three modes, length of their steps, loss of the grid."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    first = "mean" if any(line["case"]["sense"] == "mean" for line in lines) else lines[0]["case"]["sense"]
    chosen = sorted((line for line in lines if line["case"]["sense"] == first), key=order)
    names = list(dict.fromkeys(line["case"]["task"] for line in chosen))
    lr, tau = min((line["case"]["lr"], line["case"]["tau"]) for line in chosen)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(12.6, 3.1 * len(names) + 0.2), dpi=82, layout="constrained")
        axes = figure.subplots(len(names), 3, squeeze=False)
        for task, (left, middle, right) in zip(names, axes, strict=True):
            own = [line for line in chosen if line["case"]["task"] == task]
            for line in own:
                if (line["case"]["lr"], line["case"]["tau"]) == (lr, tau):
                    _mode(left, line, "loss")
                    _mode(middle, line, "step_length")
            _grid(right, [line for line in own if line["case"]["clip"] == "post"])
            _finish(left, f"{task}: training loss, lr {lr:g}, tau {tau:g}", own[0]["constant_loss"])
            _finish(middle, f"{task}: length of a step (lr times the clipped norm)")
            _finish(right, f"{task}: training loss of the post-clipped runs", own[0]["constant_loss"])
            middle.legend(
                frameon=False, title="clip", alignment="left", loc="center right", bbox_to_anchor=(1.0, 0.27)
            )
            right.legend(
                frameon=False,
                fontsize=7.5,
                title="lr, tau\n(mean of 5 steps)",
                title_fontsize=7.5,
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                handlelength=2.6,
            )
        figure.savefig(path, pil_kwargs={"optimize": True})


def _mode(axis: Any, line: Line, name: str) -> None:
    colour, dashes = MODE_LOOK[line["case"]["clip"]]
    values = _numbers(line, name)
    axis.plot(values, color=colour, linestyle=dashes, linewidth=1.6, label=line["case"]["clip"])
    missing = [step for step, loss in enumerate(line["curves"]["loss"]) if loss is None]
    if missing:
        last = missing[0] - 1
        axis.plot(last, values[last], marker="X", markersize=8, color=colour)
        axis.annotate(
            "not finite from here", (last, values[last]), (7, -3), textcoords="offset points", fontsize=8
        )


def _grid(axis: Any, runs: Sequence[Line]) -> None:
    rates = sorted({line["case"]["lr"] for line in runs})
    norms = sorted({line["case"]["tau"] for line in runs})
    for line in runs:
        case = line["case"]
        axis.plot(
            _smooth(_numbers(line, "loss"), 5),
            color=LR_COLOURS[rates.index(case["lr"]) % len(LR_COLOURS)],
            linestyle=TAU_STYLES[norms.index(case["tau"]) % len(TAU_STYLES)],
            linewidth=1.3,
            label=f"{case['lr']:g}, {case['tau']:g}",
        )


def _finish(axis: Any, title: str, constant: float | None = None) -> None:
    """Title, axes, and the loss of the constant prediction; a logarithmic axis for more than a factor of 30."""
    values = [y for curve in axis.get_lines() for y in curve.get_ydata() if not math.isnan(y)]
    if constant is not None:
        axis.axhline(constant, color="#777777", linewidth=1.0, linestyle=(0, (1, 2)), label="constant")
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_xlabel("step")
    if values and max(values) > 30 * min(values):
        axis.set_yscale("log")


def _numbers(line: Line, name: str) -> list[float]:
    return [math.nan if value is None or value <= 0 else value for value in line["curves"][name]]


def _smooth(values: Sequence[float], span: int) -> list[float]:
    return [fmean(values[max(0, i - span + 1) : i + 1]) for i in range(len(values))]
