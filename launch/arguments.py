"""The command line of `launch/train.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dsso.errors import RecipeError


@dataclass(frozen=True)
class Steps:
    """Steps `first` to `last`, counted from 1, both taken."""

    first: int
    last: int


def parse_steps(text: str) -> Steps:
    """Read `a:b`.

    Args:
        text: what the user wrote.

    Raises:
        RecipeError: it is not two numbers, in order, from 1.
    """
    first, _, last = text.partition(":")
    try:
        found = Steps(int(first), int(last))
    except ValueError:
        found = Steps(0, 0)
    if not 1 <= found.first <= found.last:
        raise RecipeError(
            "--profile_steps takes two numbers of steps",
            where="command line",
            got=text,
            allowed="A:B with 1 <= A <= B: steps A to B are profiled",
            remedy="for example --profile_steps 20:24",
        )
    return found


@dataclass(frozen=True)
class Arguments:
    """What the user asked for besides the recipe."""

    ds_config: Path
    """The recipe."""
    output_dir: Path | None
    """Takes precedence over the recipe's."""
    overrides: tuple[str, ...]
    """`a.b=c`, applied to the recipe in order."""
    resume: str
    """`none`, `auto`, or a path."""
    overwrite: bool
    """Remove the run that `output_dir` holds."""
    check: bool
    """Validate, plan and print, start nothing."""
    world_size: int | None
    """Number of ranks to plan for; None: those that were started."""
    gpu_memory: float | None
    """Gigabytes (1e9 bytes) of a device to plan for."""
    profile_steps: Steps | None
    """Steps that are profiled."""
    debug: bool
    """Log every step, look for the operation that makes a NaN, show tracebacks of all errors."""


class _Parser(argparse.ArgumentParser):
    """Reports errors as every other error of a run is reported."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, where="command line", remedy="launch/train.py --help lists the options")


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line.

    Args:
        argv: without the program's name; None takes `sys.argv`.

    Raises:
        RecipeError: for anything that is not understood.
    """
    parser = _Parser(
        prog="launch/train.py",
        description="Fine-tune a transformer as one JSON recipe describes it.",
        epilog="Start it with deepspeed, torchrun, accelerate launch, srun, mpirun or python.",
        allow_abbrev=False,
    )
    parser.add_argument("--ds_config", type=Path, required=True, metavar="FILE", help="the recipe")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="where the run is written")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="A.B=C",
        help="change one value of the recipe; may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: go on with the run in the output directory, or start it; PATH: a run or one checkpoint",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the run that the output directory holds"
    )
    parser.add_argument(
        "--check", action="store_true", help="validate, plan memory and traffic, print it, start nothing"
    )
    parser.add_argument(
        "--world_size",
        type=int,
        metavar="W",
        help="with --check: plan for so many ranks (default: those started)",
    )
    parser.add_argument(
        "--gpu_memory",
        type=float,
        metavar="GB",
        help="with --check: say what fits into a device of so many GB (exit status 1: the run does not)",
    )
    parser.add_argument(
        "--profile_steps",
        metavar="A:B",
        help="profile steps A to B with torch.profiler: OUTPUT_DIR/profile/rank*.json.gz, and a table of time by phase",
    )
    parser.add_argument("--debug", action="store_true", help="log every step, find NaNs, show tracebacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    found = parser.parse_args(argv)
    if found.resume == "auto" and found.overwrite:
        raise RecipeError(
            "--overwrite would remove the run that --resume auto goes on with",
            where="command line",
            remedy="give one of the two",
        )
    _check_plan(found)
    if found.profile_steps is not None and found.check:
        raise RecipeError(
            "--profile_steps is for a run, and --check starts none",
            where="command line",
            remedy="give one of the two",
        )
    return Arguments(
        ds_config=found.ds_config,
        output_dir=found.output_dir,
        overrides=tuple(found.overrides),
        resume=found.resume,
        overwrite=found.overwrite,
        check=found.check,
        world_size=found.world_size,
        gpu_memory=found.gpu_memory,
        profile_steps=None if found.profile_steps is None else parse_steps(found.profile_steps),
        debug=found.debug,
    )


def _check_plan(found: argparse.Namespace) -> None:
    """The options of a plan belong to `--check`, and are positive."""
    for name in ("world_size", "gpu_memory"):
        value = getattr(found, name)
        if value is not None and not found.check:
            raise RecipeError(
                f"--{name} is for planning",
                where="command line",
                got=value,
                remedy="add --check, or remove it",
            )
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError(
                f"--{name} must be above 0", where="command line", got=value, allowed="a number above 0"
            )
