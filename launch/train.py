"""Fine-tune a transformer as a recipe says.

    deepspeed launch/train.py --ds_config configs/recipe.json
    sbatch launch/slurm/multinode.sbatch configs/recipe.json
    python launch/train.py --ds_config configs/recipe.json --check

Exit status: 0 finished, 1 an error while running, 2 a recipe, a command line or an output directory that cannot be used
(nothing was trained then), 130, 143 and 138 after SIGINT, SIGTERM and SIGUSR1, with a checkpoint written; 138 as well
where the run has left by itself because its time is up. With `--check --gpu_memory`: 1 where the run does not fit.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
# A script's own folder is searched first: names in launch/ would hide modules of the same name elsewhere.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place or ".").resolve() != ROOT / "launch")]

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What launchers call a rank."""

# Remarks of tokenizers about every batch, and about processes that data loading forks, would drown the run's.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A bar for each rank, or in a log, is one too many.
if any(os.environ.get(name, "0") != "0" for name in RANKS) or not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    from dsso.errors import DssoError, RecipeError
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in {"dsso", "launch"}:
        raise
    # The usual cause is a new shell, in which the environment that the scripts have made is not active.
    remedy = (
        f". {ROOT / '.venv/bin/activate'}"
        if (ROOT / ".venv/bin/activate").exists()
        else f"bash {ROOT / 'launch/test.sh'} makes an environment .venv (then: . .venv/bin/activate),"
        " or install it with pip, see docs/guide.md"
    )
    print(f"error: {sys.executable} has no package {error.name!r}\n  remedy: {remedy}", file=sys.stderr)
    sys.exit(2)

LAUNCHER_SECONDS = 5.0
"""A launcher ends the other ranks so soon after the first one has left."""


def main() -> int:
    """Run the command line; returns the exit status."""
    from launch.arguments import parse

    debug = "--debug" in sys.argv
    if not debug:  # of libraries about each other
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    rank, world_size = 0, 1
    output_dir: Path | None = None
    try:
        arguments = parse()
        from dsso import engines

        environment = engines.launch_environment()
        rank, world_size = environment.rank, environment.world_size
        if arguments.check:
            from launch.check import check, report

            checked = check(arguments, environment)
            if rank == 0:
                print(report(checked))
            return 1 if checked.plan.fits is False else 0
        from dsso.recipe import load_recipe
        from launch.prepare import prepare

        # Before data and model are read: an MPI that cannot be used is told at once, and a port is taken.
        train = load_recipe(arguments.ds_config, arguments.overrides).dsso.train
        engines.arrange(environment, train.interface)
        job = prepare(arguments, rank, world_size)
        output_dir = job.output_dir
        from launch.run import run

        if world_size > 1:
            signal.signal(signal.SIGTERM, _terminated)
        return run(job, environment)
    except DssoError as error:
        if debug:
            traceback.print_exc()
        return _fail(error, rank, world_size)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _died(error, rank, world_size, output_dir)
        return 1


_terminations: list[int] = []
"""SIGTERMs that came while an error was on its way to its message."""


def _terminated(signum: int, frame: FrameType | None) -> None:
    """End on SIGTERM, but not on the way to the message about an error.

    A launcher that has seen another rank end sends one at once, and it takes some seconds to find out which that was.
    """
    if sys.exc_info()[0] is not None:
        _terminations.append(signum)
        return
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _fail(error: DssoError, rank: int, world_size: int) -> int:
    """Say what is wrong: rank 0 at once, others when they are still there, so it was not rank 0's error."""
    if _grouped():
        from dsso.parallel import rollcall

        if isinstance(error, RecipeError):  # which all ranks have found
            rollcall.stop()
        else:
            rollcall.end(f"error: {error}")
    deadline = time.monotonic() + LAUNCHER_SECONDS
    while rank != 0 and time.monotonic() < deadline:
        if _terminations:  # the first to leave has told the same
            _leave(error.exit_status)
        time.sleep(0.1)
    kind = "recipe error" if isinstance(error, RecipeError) else "error"
    who = f"rank {rank}: " if rank else ""
    print(f"\n{who}{kind}: {error}", file=sys.stderr, flush=True)
    if world_size > 1 and (_grouped() or not isinstance(error, RecipeError)):
        _leave(error.exit_status)
    return error.exit_status


def _grouped() -> bool:
    """A process group exists, which must not be waited for."""
    found = sys.modules.get("torch.distributed")
    return found is not None and found.is_available() and found.is_initialized()


def _died(error: Exception, rank: int, world_size: int, output_dir: Path | None) -> None:
    """Report an error that nobody foresaw, and leave: a process group must not be waited for."""
    traceback.print_exc()
    if world_size == 1:
        return
    from dsso.parallel import rollcall

    words = str(error).lower()
    if any(
        sign in words for sign in ("timed out", "timeout", "connection", "closed by peer", "nccl", "gloo")
    ):
        # What the collective call says is in the traceback, and is about this rank, not about the cause.
        found = rollcall.missing()
        told = f"rank {rank}: another rank has ended, or did not answer within dsso.train.timeout_minutes" + (
            f": {found}" if found else "; the first message of any rank names the cause"
        )
    else:
        rollcall.end(f"{type(error).__name__}: {error}")
        told = f"rank {rank} of {world_size} ends: {type(error).__name__}: {error}"
    print(f"\n{told}{_what_now(output_dir)}", file=sys.stderr)
    _leave(1)


def _what_now(output_dir: Path | None) -> str:
    """What to do when the cause is mended: go on from the last step, or the newest checkpoint, if there is one."""
    if output_dir is None:
        return ""
    from dsso import checkpoint, seedlog

    log = output_dir / seedlog.FILE
    try:
        if log.exists():
            return f"\n  remedy: --resume auto goes on from the last step of {log}"
        found, _ = checkpoint.find(output_dir / "checkpoints")
    except OSError:
        return ""
    if not found:
        return "\n  remedy: there is no checkpoint yet; start again (--overwrite)"
    return f"\n  remedy: --resume auto goes on from {found[0].path}"


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
