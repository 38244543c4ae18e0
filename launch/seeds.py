"""The seed log of a run: written step by step, and taken up again where a run that was cut off has left it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dsso import seedlog
from dsso.diagnostics import MetricsLog
from dsso.errors import RunError
from dsso.replay import Steps, check, logged
from dsso.seedlog import Start

if TYPE_CHECKING:
    from dsso.engines.forward import ForwardEngine
    from dsso.engines.protocol import Engine
    from launch.prepare import Job


class Seeds:
    """Keeps the log of one run.

    Args:
        job: its recipe.
        engine: of a method from forward passes.
        step: steps taken, by a checkpoint; others follow from the log.

    Attributes:
        reached: steps taken when those of the log have been taken again.

    Raises:
        RunError: the log of the run that is to go on cannot be used, and there is no checkpoint.
    """

    def __init__(self, job: Job, engine: Engine, step: int) -> None:
        self._engine = cast("ForwardEngine", engine)
        self._config = job.recipe.dsso.train
        self._params: dict[str, Any] = job.recipe.optimizer_config.model_dump(mode="json")
        self._path = job.output_dir / seedlog.FILE
        self._writes = job.rank == 0
        self._step = step
        self._steps = self._read(job, step)
        self.reached = step + len(self._steps)
        self._log: MetricsLog | None = None
        self._begun_at = ""

    def _read(self, job: Job, step: int) -> Steps:
        """Steps of the log beyond the checkpoint."""
        if job.resume.log is None:
            return []
        try:
            return logged(job.resume.log, step)[: max(0, job.max_steps - step)]
        except RunError as error:
            if not step:
                raise
            if job.rank == 0:
                print(f"warning: the seed log is not used: {error}", flush=True)
            return []

    def catch_up(self, interval: int, arrived: Callable[[int], None]) -> None:
        """Take the steps of the log again, and begin to write after them; collective.

        Args:
            interval: steps between two stops.
            arrived: called at every multiple of `interval`, with the number of steps taken.

        Raises:
            RunError: the log is of another model, or the weights are not those that it tells.
        """
        check(self._path, self._steps, self._engine, self._step)
        step = self._step
        while step < self.reached:
            end = min(self.reached, (step // interval + 1) * interval)
            self._engine.replay(self._steps[step - self._step : end - self._step])
            step = end
            if step % interval == 0:
                arrived(step)
        path: Path | None = self._path if self._writes else None
        self._log = MetricsLog(path, step, self._config.log_sync_interval)
        self._begun_at = self._engine.digest()

    def add(self) -> None:
        """Write the step that was just taken; collective where digests are due."""
        assert self._log is not None
        engine, interval = self._engine, self._config.digest_interval
        record = dict(engine.record)
        step = int(record["step"])
        if self._begun_at:
            sizes = dict(engine.optimizer.table.sizes)
            name = str(engine.optimizer.method_name)
            start = Start(step - 1, name, self._params, sizes, engine.left, self._begun_at, engine.dtype)
            self._log.write(**start.line())
            self._begun_at = ""
        if interval is not None and step % interval == 0:
            record["digest"] = engine.digest()
        self._log.write(seed=self._params.get("seed"), **record)

    @property
    def measures(self) -> list[list[float]]:
        """Of the last step; empty where it was skipped."""
        found: list[list[float]] = self._engine.record["measures"]
        return found

    def close(self) -> None:
        """Write what is pending.

        Raises:
            RunError: it cannot be written.
        """
        if self._log is not None:
            self._log.close()
