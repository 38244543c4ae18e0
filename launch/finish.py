"""The end of a run: the best weights are tested and exported, the summary is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dsso import tasks
from dsso.checkpoint import CheckpointError, write_json
from dsso.diagnostics import jsonable, peak_bytes
from dsso.parallel.collectives import gather_objects, problem_on_rank_0
from launch.loop import Loop, Outcome
from launch.prepare import Job

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine


def finish(job: Job, engine: Engine, loop: Loop, outcome: Outcome) -> None:
    """Test with the best weights, write `adapter/` and `summary.json`; every rank calls it.

    Raises:
        CheckpointError: they could not be written.
    """
    weights = loop.best.weights()
    if weights is None:
        loop.progress.say(
            f"warning: no evaluation gave a finite {loop.best.metric}: the last weights are tested"
        )
        weights = engine.gathered_state_dict()
    else:
        engine.load_weights(weights)
    test = loop.evaluate("test")
    adapter = job.output_dir / "adapter"
    if job.recipe.dsso.peft.type != "none":
        _on_rank_0(lambda: _export(job, weights, adapter), adapter)
    health = engine.health()
    peaks = gather_objects(peak_bytes(engine.device))
    states = gather_objects(engine.state_bytes())
    summary = {
        "optimizer": job.recipe.optimizer_type,
        "task": job.task.spec.name,
        "model": job.bundle.name,
        "ended": outcome.reason,
        "steps": loop.step,
        "world_size": job.world_size,
        "main_metric": loop.best.metric,
        "best_metric": loop.best.value,
        "best_step": loop.best.step,
        "test_metric": test.get(loop.best.metric),
        "test": test,
        "majority_baseline": job.data.majority_baseline,
        "train_loss": loop.last_loss,
        "wall_seconds": loop.seconds,
        "peak_bytes": max(peaks),
        "state_bytes": max(states),
        "state_bytes_all_ranks": sum(states),
        "skipped_steps": int(health.get("skipped_steps", 0)),
        "clip_events": int(health.get("clip_events", 0)),
    }
    path = job.output_dir / "summary.json"
    _on_rank_0(lambda: write_json(path, jsonable(summary)), path)
    loop.progress.say(
        f"{outcome.reason} after {loop.step} steps: best validation {loop.best.metric}"
        f" {_number(loop.best.value)} (step {loop.best.step}), test {_number(test.get(loop.best.metric))};"
        f" {path}"
    )


def _export(job: Job, weights: dict[str, Tensor], directory: Path) -> None:
    """Write `adapter/` aside, then put it in place."""
    aside = directory.with_name(f".{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    tasks.adapters.export(job.bundle, weights, aside)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def _on_rank_0(action: Callable[[], None], path: Path) -> None:
    problem = problem_on_rank_0(action)
    if problem is not None:
        raise CheckpointError(
            f"could not be written ({problem})",
            where=str(path),
            remedy="make room on the disk and finish with --resume auto",
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
