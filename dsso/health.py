"""How a run is doing, rank by rank, read from the files that it writes: `python -m dsso.diagnostics RUN [--follow]`.

Nothing is asked of the run itself: `metrics.jsonl` holds, in the lines of logged steps, a list `ranks` with each rank's
seconds a step, the seconds of them in which it computed, its memory and the age of its factors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsso.errors import DssoError, RecipeError
from dsso.results import Run, read_run, text_table

SLOW = 1.3
"""Times the median of the ranks' own work from which on a rank is called the slowest."""
SILENT = 60.0
"""Seconds without a line, and ten logging intervals, after which a run under way is suspected to have ended."""


@dataclass(frozen=True)
class Health:
    """What is known of a run at one moment."""

    text: str
    """For a person."""
    ended: bool
    """The run has written its summary."""


def report(run: Run, now: float) -> Health:
    """Say how a run is doing.

    Args:
        run: from `dsso.results.read_run`.
        now: time since the epoch.
    """
    last: Mapping[str, Any] = run.steps[-1] if run.steps else {}
    ended = bool(run.summary)
    total = run.config.get("max_steps")
    pace = _pace(run)
    lines = [
        f"{run.directory}: {run.optimizer}, {_count(run.config.get('world_size'), 'rank')}, {_state(run, now, pace)}"
    ]
    figures = [f"step {last.get('step', 0)}" + (f"/{total}" if total else "")]
    for key, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("lr", "lr", "{:.2e}"),
        ("update_norm", "|u|", "{:.3g}"),
    ):
        if last.get(key) is not None:
            figures.append(f"{label} {form.format(last[key])}")
    lines.append("  ".join(figures))
    lines.append("  ".join(_method(run, last)) or "no figures of a method")
    if pace is not None:
        told = f"{pace:.3g} s a step"
        if not ended and isinstance(total, int) and "step" in last:
            told += f"  {_span(pace * max(0, total - int(last['step'])))} left at this pace"
        lines.append(told)
    metric, (steps, values) = run.metric(), run.validation()
    if values:
        lines.append(
            f"validation {metric} {values[-1]:.4f} (step {steps[-1]:.0f}), highest {max(values):.4f}"
        )
    lines += _ranks(run)
    lines += [f"warning: {one}" for one in run.warnings]
    return Health("\n".join(lines), ended)


def _state(run: Run, now: float, pace: float | None) -> str:
    if run.summary:
        return f"ended ({run.summary.get('ended', '?')})"
    age = now - (run.directory / "metrics.jsonl").stat().st_mtime
    steps = [line["step"] for line in run.steps[-2:]]
    interval = (steps[-1] - steps[0] if len(steps) == 2 else 1) * (pace or 1.0)
    told = f"under way, last line {_span(age)} ago"
    if age > max(SILENT, 10 * interval):
        told += " (has it ended? what its ranks printed last says why; --resume auto goes on)"
    return told


def _pace(run: Run) -> float | None:
    """Seconds a step over the last lines; evaluations and checkpoints are part of it."""
    lines = [line for line in run.steps[-10:] if "seconds" in line]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    if len(lines) == 1:
        return float(last["seconds"]) / max(1, int(last["step"]))
    return max(0.0, float(last["seconds"] - first["seconds"])) / max(1, int(last["step"] - first["step"]))


def _method(run: Run, last: Mapping[str, Any]) -> list[str]:
    found = []
    _, rates = run.clip_rate()
    if rates:
        found.append(f"clipped {rates[-1]:.0%} of late steps")
    for key, label in (("damping", "damping"), ("cos_update_grad", "cos(u, g)"), ("slope", "slope")):
        if last.get(key) is not None:
            found.append(f"{label} {last[key]:.3g}")
    ages = [age for age in _column(last, "factor_age") if age is not None and age >= 0]
    if ages:
        found.append(f"factors {_range(ages)} steps old")
    elif "factor_age" in last:
        found.append("no factorization yet")
    for key, label in (("skipped_steps", "steps skipped"), ("factor_failures", "factorizations failed")):
        if last.get(key):
            found.append(f"{last[key]:.0f} {label}")
    return found


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _column(line: Mapping[str, Any], name: str) -> list[Any]:
    ranks = line.get("ranks")
    found = ranks.get(name) if isinstance(ranks, Mapping) else None
    return found if isinstance(found, list) else []


def _ranks(run: Run) -> list[str]:
    """The table of the ranks at the last logged step, the slowest of them marked."""
    last = next((line for line in reversed(run.steps) if _column(line, "busy")), None)
    if last is None:
        return ["no figures of single ranks: written by an earlier version of dsso"]
    hosts = next((found for line in reversed(run.steps) if (found := _column(line, "host"))), [])
    busy, seconds = _column(last, "busy"), _column(last, "seconds")
    memory, ages = _column(last, "bytes"), _column(last, "factor_age")
    middle = statistics.median(busy)
    slowest = max(range(len(busy)), key=lambda rank: busy[rank])
    table = [["rank", "host", "step", "s/step", "own work", "memory", "factors", ""]]
    for rank, own in enumerate(busy):
        mark = ""
        if rank == slowest and len(busy) > 1 and own > SLOW * middle > 0:
            mark = f"slowest: {own / middle:.1f} times the median"
        table.append(
            [
                str(rank),
                str(_at(hosts, rank) or "?"),
                str(last["step"]),
                f"{seconds[rank]:.3f}",
                f"{own:.3f}",
                f"{memory[rank] / 1e9:.2f} GB",
                "-" if (age := _at(ages, rank)) is None else f"{age:.0f}",
                mark,
            ]
        )
    return ["", text_table(table)]


def _at(column: Sequence[Any], rank: int) -> Any:
    return column[rank] if rank < len(column) else None


def _count(number: object, noun: str) -> str:
    return f"? {noun}s" if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    whole = round(max(0.0, seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def follow(directory: Path, every: float, show: Callable[[str], None]) -> None:
    """Show a run again whenever it has written something, until it has ended.

    Args:
        directory: of the run.
        every: seconds between two looks.
        show: takes the text.

    Raises:
        RecipeError: it is not the directory of a run.
    """
    seen = None
    while True:
        written = _written(directory)
        if written != seen:
            seen = written
            health = report(read_run(directory), time.time())
            show(health.text)
            if health.ended:
                return
        time.sleep(every)


def _written(directory: Path) -> tuple[tuple[int, int], ...]:
    """Something that changes when the run writes."""
    found = []
    for name in ("metrics.jsonl", "summary.json"):
        try:
            state = (directory / name).stat()
            found.append((state.st_mtime_ns, state.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 where there is no run, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m dsso.diagnostics",
        description="How a run is doing: loss, clipping, damping, age of factors, and every rank's pace and memory.",
    )
    parser.add_argument("run", type=Path, help="output directory of the run")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended; Ctrl-C leaves")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.every < float("inf"):
            raise RecipeError(
                "must be above 0", where="--every", got=arguments.every, allowed="seconds above 0"
            )
        if arguments.follow:
            follow(arguments.run, arguments.every, lambda text: print(f"{text}\n", flush=True))
        else:
            print(report(read_run(arguments.run), time.time()).text)
    except DssoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # head, less: they have seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
