"""The weights of any step of a run, made again from its seed log: `python -m dsso.replay RUN --to STEP`.

It begins with the newest checkpoint at or before that step, or with the weights that the run began with, and takes the
steps of the log again: no data is read and no loss evaluated. Under a launcher the ranks share the work and the memory
as the recipe says, at any number of ranks and ZeRO stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsso import checkpoint, engines, seedlog
from dsso.errors import DssoError, RecipeError, RunError
from dsso.files import save_file
from dsso.parallel.collectives import broadcast_object, rank
from dsso.recipe import load_recipe
from dsso.seeding import seed_everything
from dsso.seedlog import Start

if TYPE_CHECKING:
    from dsso.engines.forward import ForwardEngine


Steps = list[tuple[Start, Mapping[str, Any]]]


def logged(path: Path, step: int, end: int | None = None) -> Steps:
    """What a seed log says about the steps after `step`; collective.

    Args:
        path: the log, read by rank 0.
        step: steps taken.
        end: the last one wanted; None: of the log.

    Raises:
        RunError: on every rank, when the log is damaged or has not all of them.
    """
    found: Any = None
    if rank() == 0:
        try:
            log = seedlog.read(path)
            last = log.last if end is None else end
            found = log.between(step, last) if last > step else []
        except RunError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, RunError):
        raise found
    steps: Steps = found
    return steps


def check(path: Path, steps: Steps, engine: ForwardEngine, step: int) -> None:
    """Make sure that steps of a log can be taken by an engine; collective.

    Args:
        path: of the log.
        steps: from `logged`.
        engine: with the weights after `step` steps.
        step: steps taken.

    Raises:
        RunError: the log is of another model or method, or goes on from other weights.
    """
    if not steps:
        return
    start = steps[0][0]
    _compare(path, start, engine)
    if step == start.step and start.digest != engine.digest():
        raise RunError(
            f"the weights after step {step} are not those that the log goes on from",
            where=str(path),
            remedy="take the model, adapters and dsso.train.seed of that run",
        )


def _compare(path: Path, start: Start, engine: ForwardEngine) -> None:
    """Refuse the log of another model or method."""
    mine = dict(engine.optimizer.table.sizes)
    narrow = start.dtype != "float32"
    for what, theirs, ours in (
        ("rounding of 16-bit weights", narrow and start.params.get("rounding"), narrow and engine.rounding),
        ("method", start.method, engine.optimizer.method_name),
        ("number format", start.dtype, engine.dtype),
        ("trained parameters", start.parameters, mine),
    ):
        if theirs == ours:
            continue
        if isinstance(theirs, dict) and isinstance(ours, dict):
            names = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
            raise RunError(
                f"the log was written with other trained parameters: {', '.join(names[:3])}",
                where=str(path),
                got=f"{len(ours)} parameters",
                allowed=f"the {len(theirs)} of the log",
            )
        raise RunError(
            f"the log was written with another {what}", where=str(path), got=ours, allowed=str(theirs)
        )


def rebuild(run: Path, to: int) -> ForwardEngine:
    """An engine with the weights after a step; collective under a launcher.

    Args:
        run: output directory of a run.
        to: steps taken.

    Raises:
        RecipeError: there is no such step.
        RunError: the log cannot be used.
    """
    from dsso import tasks

    log = seedlog.read(run / seedlog.FILE)
    last = log.last
    if to > last:
        raise RecipeError("the log ends before that step", where="--to", got=to, allowed=f"0 to {last}")
    try:
        written = json.loads((run / "config.json").read_text(encoding="utf-8"))["resolved"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"there is no config.json of a run ({error})", where=str(run)) from None
    environment = engines.launch_environment()
    recipe = load_recipe(_for_any_number_of_ranks(_as_logged(written, log, to)))
    config = recipe.dsso
    seed_everything(config.train.seed)
    task = tasks.without_data(config.task, config.train.seed, "not read: a replay evaluates nothing")
    bundle = tasks.models.load(config.model, task, config.task, recipe.precision.torch_dtype)
    bundle = tasks.adapters.apply(bundle, config.peft)
    engines.start(environment, config.train.timeout_minutes, config.train.interface)
    engine: Any = engines.build(bundle.model, recipe.resolved(environment.world_size, to or 1), environment)
    good, _ = checkpoint.find(run / "checkpoints")
    start, _ = checkpoint.newest([one for one in good if one.step <= to])
    if start is not None:
        engine.load_checkpoint(start.path.parent, start.path.name)
    path, step = run / seedlog.FILE, 0 if start is None else start.step
    steps = logged(path, step, to)
    check(path, steps, engine, step)
    engine.replay(steps)
    built: ForwardEngine = engine
    return built


def _as_logged(written: dict[str, Any], log: seedlog.SeedLog, to: int) -> dict[str, Any]:
    """The recipe with the method's parameters of that step: the run may have gone on with others later."""
    starts = [start for start in log.starts if start.step < to]
    if starts:
        written["optimizer"] = {**written["optimizer"], "params": starts[-1].params}
    return written


def _for_any_number_of_ranks(written: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run with a batch that any ranks can share: none is taken."""
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        written.pop(key, None)
    written["train_micro_batch_size_per_gpu"] = 1
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dsso.replay",
        description="Make the weights of a step again from the seed log of a run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output directory of a run")
    parser.add_argument(
        "--to", type=int, required=True, metavar="STEP", help="number of steps taken; 0: the start"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: RUN/weights_STEP.safetensors")
    options = parser.parse_args(arguments)
    for kind in (FutureWarning, DeprecationWarning):  # of libraries about each other
        warnings.simplefilter("ignore", kind)
    try:
        if options.to < 0:
            raise RecipeError("is no number of steps", where="--to", got=options.to, allowed="0 or more")
        engine = rebuild(options.run, options.to)
        weights = engine.gathered_state_dict()
        told = engine.digest()
        if rank() == 0:
            path = options.out or options.run / f"weights_{options.to:08d}.safetensors"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(weights, path, {"step": str(options.to), "digest": told})
            except OSError as error:
                raise RunError(f"cannot be written ({error.strerror})", where=str(path)) from None
            print(f"{len(weights)} trained parameters after step {options.to}, digest {told}: {path}")
        engine.close()
    except DssoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    engines.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
