"""A prepared job is started, trained, tested; process groups exist from here on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from dsso import checkpoint, engines, optim
from dsso.diagnostics import MetricsLog, environment, jsonable, method_table
from dsso.job_time import JobTime, end_of_job, process_start
from dsso.preempt import StopRequest, leave
from dsso.seeding import seed_everything
from launch.directory import open_directory
from launch.finish import finish
from launch.loop import Loop
from launch.prepare import Job
from launch.resume import moved
from launch.seeds import Seeds

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine


def run(job: Job, place: engines.Environment) -> int:
    """Train a job; returns the exit status.

    Args:
        job: from `prepare`.
        place: this process among the launched ones.

    Raises:
        RunError: the run cannot go on.
    """
    train = job.recipe.dsso.train
    engines.start(place, train.timeout_minutes, train.interface)
    engine = cast("Engine", engines.build(job.bundle.model, job.recipe, place))
    seed_everything(job.seed, job.rank)
    with StopRequest(speak=job.rank == 0) as stop:
        open_directory(job)
        start, skipped = checkpoint.newest(job.resume.candidates)
        for one in (*job.resume.skipped, *skipped):
            _say(job, f"checkpoint {one.path} is skipped: {one.reason}")
        for note in job.resume.notes:
            _say(job, note)
        step = 0 if start is None else start.step
        _write_config(job, engine, place, step)
        seeds = Seeds(job, engine, step) if optim.is_forward(job.recipe.optimizer_type) else None
        reached = step if seeds is None else seeds.reached
        log = MetricsLog(job.output_dir / "metrics.jsonl" if job.rank == 0 else None, reached)
        time_left = JobTime(None)
        if job.rank == 0:
            end = end_of_job(train.time_limit_minutes, process_start())
            time_left = JobTime(end, job.output_dir / "checkpoints" / "seconds.json")
        loop = Loop(job, engine, stop, log, seeds, time_left)
        if start is not None:
            change = moved(start, engine)
            if change is not None:
                _say(job, f"{start.path.name}: {change}")
            loop.resume(start)
            _say(job, f"going on from {start.path} (step {start.step})")
        elif job.resume.candidates:
            _say(job, "no checkpoint can be used: starting from the beginning")
        if reached > step:
            _say(job, f"taking steps {step + 1} to {reached} again from {job.resume.log}")
        loop.catch_up()
        loop.checkpoints.drop_after(reached)
        outcome = loop.run()
        if seeds is not None:
            seeds.close()
        if outcome.signum is not None:
            log.close()
            _say(job, f"stopped after step {loop.step}; --resume auto goes on")
            engine.close()
            if job.world_size > 1:
                # All leave at the same time and with the same status, while a signal still means nothing more:
                # a launcher ends the others when the first one has left, and a scheduler looks at the status.
                engines.settle()
                leave(128 + outcome.signum)
            engines.stop()
            return 128 + outcome.signum
        finish(job, engine, loop, outcome)
        log.close()
        engine.close()
    engines.stop()
    return 0


def _say(job: Job, message: str) -> None:
    if job.rank == 0:
        print(message, flush=True)


def _write_config(job: Job, engine: Engine, place: engines.Environment, step: int) -> None:
    """Print the table and write `config.json`, with the starts before this one."""
    if job.rank != 0:
        return
    rows = engine.table()
    print(method_table(rows), flush=True)
    path = job.output_dir / "config.json"
    started = environment()
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError):
            starts = []
    starts.append({"command": started["command"], "started": started["started"], "step": step})
    resolved = job.recipe.to_json()
    config = {
        "optimizer": job.recipe.optimizer_type,
        "recipe": str(job.arguments.ds_config),
        "resolved": resolved,
        "world_size": job.world_size,
        "launcher": place.launcher,
        "max_steps": job.max_steps,
        "data": job.task.source,
        **started,
        "starts": starts,
        "parameters": rows,
    }
    checkpoint.write_json(path, jsonable(config))
