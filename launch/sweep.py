"""Run one recipe at many settings: a grid or random draws of values, with several seeds.

    python launch/sweep.py check SWEEP.json
    python launch/sweep.py run SWEEP.json --out DIR [--index I]
    python launch/sweep.py table DIR [--plot FILE.png]

Exit status of `run`: 0 all points have finished or diverged, 1 a point failed, 2 a sweep file or command line that
cannot be used (nothing was started then), 128 + signal when it was stopped; the same command goes on. With `--index`
it is the run's own where that has failed or was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# As in train.py: names in launch/ would hide modules of the same name elsewhere.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place or ".").resolve() != ROOT / "launch")]

try:
    from dsso.errors import DssoError, RecipeError, RunError
    from dsso.results import text_table
    from dsso.sweep.format import SweepFile, read, short_names
    from dsso.sweep.points import Point, points
    from dsso.sweep.record import LOG, Ending, agree, directory, ending, open_directory
    from dsso.sweep.table import number, read_table, shown
    from launch.sweep_run import Busy, Signals, run_point
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in {"dsso", "launch"}:
        raise
    print(
        f"error: {sys.executable} has no package {error.name!r}\n"
        "  remedy: activate the environment that launch/train.py runs in, see docs/guide.md",
        file=sys.stderr,
    )
    sys.exit(2)

ARRAY_MOST = 1001
"""Slurm's default MaxArraySize."""
OUT_OF_TIME = 128 + signal.SIGUSR1
"""Exit status of a run whose job is to be queued again."""


class _Parser(argparse.ArgumentParser):
    """Reports errors as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, where="command line", remedy=f"{self.prog} --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch/sweep.py", description="Run one recipe at many settings.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    check = commands.add_parser("check", help="validate every point and list them; start nothing")
    run = commands.add_parser("run", help="run the points that have not ended yet, or one of them")
    for one in (check, run):
        one.add_argument("sweep", type=Path, metavar="SWEEP.json")
        one.add_argument(
            "--out", type=Path, metavar="DIR", required=one is run, help="where runs are written"
        )
        one.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="A.B=C",
            help="change one value of the recipe in all points; may be repeated",
        )
        one.add_argument(
            "--launcher",
            default="",
            metavar="WORDS",
            help="what stands before launch/train.py, e.g. 'deepspeed --num_gpus 2'; {port} becomes a free port"
            " (default: this Python)",
        )
        one.add_argument(
            "--world_size",
            type=int,
            metavar="W",
            help="ranks of a run, for batch sizes (default: 1, or not checked when a launcher is given)",
        )
    run.add_argument("--index", type=int, metavar="I", help="run this point only, counted from 0")
    table = commands.add_parser("table", help="a row for every setting, the best first")
    table.add_argument("out", type=Path, metavar="DIR", help="directory of a sweep")
    table.add_argument("--target_loss", type=float, metavar="X", help="count the steps to this training loss")
    table.add_argument(
        "--metric",
        metavar="NAME",
        help="a metric of the validation set, or train_loss (default: the main one)",
    )
    table.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (.png, .pdf, .svg)")
    table.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = _parser().parse_args(argv)
        if options.command == "check":
            return _check(options)
        if options.command == "run":
            return _run(options)
        return _table(options)
    except DssoError as error:
        kind = "sweep error" if isinstance(error, RecipeError) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _read(options: argparse.Namespace) -> tuple[SweepFile, list[Point]]:
    """The sweep file and its points, everything checked."""
    launcher = shlex.split(options.launcher)
    if launcher and shutil.which(launcher[0]) is None:
        raise RecipeError("there is no such program", where="--launcher", got=launcher[0])
    if options.world_size is not None and options.world_size < 1:
        raise RecipeError("must be above 0", where="--world_size", got=options.world_size)
    ranks = options.world_size or (None if launcher else 1)
    sweep = read(options.sweep)
    return sweep, points(sweep, options.sweep, options.overrides, ranks)


def _check(options: argparse.Namespace) -> int:
    sweep, found = _read(options)
    out = options.out or Path("runs") / options.sweep.stem
    agree(out, found)
    endings = [ending(directory(out, point.name)) for point in found]
    names = short_names(sweep.variables)
    seeds = [] if sweep.seeds is None else ["seed"]
    rows = [["index", *names.values(), *seeds, "state"]]
    for point, how in zip(found, endings, strict=True):
        seed = [] if point.seed is None else [str(point.seed)]
        rows.append([str(point.index), *map(shown, point.values.values()), *seed, how.state])
    print(text_table(rows))
    count = len(found)
    recipe = os.path.normpath(options.sweep.parent / sweep.recipe)
    print(f"\n{count} {'point' if count == 1 else 'points'} of {recipe}; none was started")
    shared = shlex.join(
        [
            str(options.sweep),
            "--out",
            str(out),
            *(word for one in options.overrides for word in ("--set", one)),
            *(["--launcher", options.launcher] if options.launcher else []),
        ]
    )
    print(f"here, one after another:  python launch/sweep.py run {shared}")
    print(f"as a Slurm array:         sbatch --array=0-{count - 1} launch/slurm/array.sbatch {shared}")
    if count > ARRAY_MOST:
        print(f"note: Slurm takes arrays of {ARRAY_MOST} tasks unless its MaxArraySize says otherwise")
    return 0


def _run(options: argparse.Namespace) -> int:
    sweep, found = _read(options)
    index = options.index
    if index is not None and not 0 <= index < len(found):
        raise RecipeError(
            "there is no such point", where="--index", got=index, allowed=f"0 to {len(found) - 1}"
        )
    open_directory(options.out, options.sweep, sweep, found)
    launcher = shlex.split(options.launcher)
    with Signals() as signals:
        if index is not None:
            return _one(found[index], options.out, launcher, sweep, signals)
        return _all(found, options.out, launcher, sweep, signals)


def _one(point: Point, out: Path, launcher: Sequence[str], sweep: SweepFile, signals: Signals) -> int:
    """Run one point; its output is this process's."""
    folder = directory(out, point.name)
    print(f"point {point.index}: {point.name} in {folder}", flush=True)
    before = ending(folder)
    how = run_point(point, out, launcher, sweep.diverged, signals, follow=True)
    print(f"point {point.index}: {how.state}{' before' if before.final else ''}{_because(how)}", flush=True)
    return 0 if how.final else _status(how, signals.signum)


def _status(how: Ending, signum: int | None) -> int:
    """Exit status for a run that has not come to its end."""
    status = how.status or RunError.exit_status
    if signum is not None and how.state == "stopped" and status < 128:
        return 128 + signum
    return status


def _all(
    found: Sequence[Point], out: Path, launcher: Sequence[str], sweep: SweepFile, signals: Signals
) -> int:
    """Run all points that have not ended yet, one after another."""
    before = [ending(directory(out, point.name)) for point in found]
    known = Counter(how.state for how in before if how.final)
    told = "".join(f", {count} {state} before" for state, count in sorted(known.items()))
    print(f"{len(found)} points{told}; {sum(not how.final for how in before)} to run", flush=True)
    bad = 0
    for point in found:
        folder = directory(out, point.name)
        was = ending(folder)
        if was.final:
            continue
        begin = f"{point.index + 1}/{len(found)} {point.name}"
        print(f"{begin}: {'started' if was.state == 'missing' else 'going on'}", flush=True)
        since = time.monotonic()
        try:
            how = run_point(point, out, launcher, sweep.diverged, signals)
        except Busy:
            print(f"{begin}: is run by another process, left to it", flush=True)
            continue
        seconds = time.monotonic() - since
        log = "" if how.final else f" ({folder / LOG})"
        print(f"{begin}: {how.state} after {seconds:.1f} s{_because(how)}{log}", flush=True)
        status = how.status or 0
        # A run that leaves so by itself does it because the time of the job is up.
        if signals.signum is not None or status == OUT_OF_TIME:
            print("the sweep was stopped; the same command goes on", flush=True)
            return status if status > 128 or signals.signum is None else 128 + signals.signum
        bad += not how.final
    print()
    print(text_table(read_table(out).rows()))
    if bad:
        print(f"\n{bad} of {len(found)} points have not come to their end; the same command tries them again")
    return 1 if bad else 0


def _because(how: Ending) -> str:
    return f": {how.reason}" if how.reason else ""


def _table(options: argparse.Namespace) -> int:
    if options.target_loss is not None and not math.isfinite(options.target_loss):
        raise RecipeError("must be a number", where="--target_loss", got=options.target_loss)
    found = read_table(options.out, options.metric, options.target_loss)
    drawn = None
    if options.plot is not None:
        from dsso import plots_sweep

        drawn = plots_sweep.save(found, options.plot)
    if options.json:
        print(json.dumps(found.to_json(), allow_nan=False))
        return 0
    print(text_table(found.rows()))
    for text in found.problems:
        print(text)
    best = found.settings[0]
    if best.metric.median is not None and found.variables:
        words = " ".join(
            f"--set {shlex.quote(f'{path}={json.dumps(value)}')}" for path, value in best.values.items()
        )
        print(f"best: {found.title} {number(best.metric.median)} with {words}")
    if drawn is not None:
        print(f"plot: {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
