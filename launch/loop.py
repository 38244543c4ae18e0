"""The training loop: windows, logging steps, evaluations, checkpoints, the stop signal.

One window is one optimizer step. Which examples it takes is a pure function of (seed, step), and every rank
divides its sums of losses by the number of loss terms of the whole global batch, so a step does not depend on
how the batch was split. Nothing here looks at a device value except on logging steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsso.checkpoint import Checkpoint, Checkpointer, CheckpointError, find, rng_state, set_rng_state
from dsso.diagnostics import FlatWatch, MetricsLog, NoopWatch, Pace, SkipGuard, ranks_entry
from dsso.engines import estimates
from dsso.job_time import JobTime
from dsso.parallel import rollcall
from dsso.parallel.collectives import gather_objects, rank
from dsso.preempt import REQUEUE, StopRequest, control_device
from dsso.seeding import seed_everything
from dsso.tasks.data import Batch, global_batch, micro_batches
from launch.best import Best
from launch.prepare import Job
from launch.profile import Profile
from launch.progress import Progress

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine
    from launch.seeds import Seeds


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    reason: str
    """`finished`, `patience` or `stopped`."""
    signum: int | None = None
    """The signal, for `stopped`."""


class Loop:
    """Trains one job.

    Args:
        job: what to train on.
        engine: model and optimizer.
        stop: the stop signal.
        log: `metrics.jsonl`.
        seeds: the seed log, for a method from forward passes.
        time_left: when the run has to leave by itself; None: never.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        stop: StopRequest,
        log: MetricsLog,
        seeds: Seeds | None = None,
        time_left: JobTime | None = None,
    ) -> None:
        self.job = job
        self.engine = engine
        self.stop = stop
        self.log = log
        self.seeds = seeds
        self.time_left = time_left or JobTime(None)
        train = job.recipe.dsso.train
        self.config = train
        self.log_interval = 1 if job.arguments.debug else train.log_interval
        self.save_interval = train.save_interval or train.eval_interval
        self.step = 0
        self.seconds = 0.0
        self.last_loss: float | None = None
        self.last_health: Mapping[str, float] = {}
        self.best = Best(job.output_dir / "best", job.data.main_metric)
        self.checkpoints = Checkpointer(job.output_dir / "checkpoints", train.keep_last)
        self.progress = Progress(0, job.max_steps, speak=job.rank == 0)
        self._noop: NoopWatch | None = None
        self._flat = FlatWatch(train.noop_window)
        if job.recipe.is_method and seeds is None:
            params = job.recipe.optimizer_config.model_dump()
            self._noop = NoopWatch(train.noop_window, job.recipe.optimizer_type, params)
        scaled = job.recipe.precision.loss_scale == "dynamic"
        self._guard = SkipGuard(train.max_consecutive_skips, scaled)
        # this rank's micro-batches since the last log: sum of finite losses, their number, number of others
        self._sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self._stop_device = control_device(engine.device)
        self._tick = time.monotonic()
        self._pace = Pace(engine.device)
        self._profile = Profile(job.arguments.profile_steps, job.output_dir, job.rank)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written; every rank calls it."""
        state, ranks = self.checkpoints.load(self.engine, checkpoint)
        self.step = checkpoint.step
        self.seconds = state["seconds"]
        self.last_loss = state["last_loss"]
        self._guard.restore(state["skips"])
        if self._noop is not None and state["noop"] is not None:
            self._noop.restore(state["noop"])
        self.best.restore(state["best"], checkpoint.path.parent.parent / "best")
        if checkpoint.world_size == self.job.world_size:
            self._sums.copy_(ranks[0]["sums"])
            set_rng_state(ranks[0]["rng"])
        else:
            # Random streams belong to ranks: others begin here. Sums are added up over ranks when they are logged.
            seed_everything(self.job.seed, self.job.rank, self.step)
            if self.job.rank == 0:
                self._sums.copy_(torch.stack([one["sums"] for one in ranks]).sum(0))
        # What is logged is a mean over micro-batches, of which a window may have another number now.
        self._sums[:2] *= self._micro_batches() / state["micro_batches"]

    def catch_up(self) -> None:
        """Take the steps again that the seed log has beyond the checkpoint; every rank calls it."""
        if self.seeds is None:
            return

        def arrived(step: int) -> None:
            self.step = step
            self.evaluate("validation", again=step in self.log.evaluated)

        before = self.step
        self.seeds.catch_up(self.config.eval_interval, arrived)
        self.step = self.seeds.reached
        if before < self.step >= self.job.max_steps:
            # The run was killed after its last step, before the end of what follows it.
            if self.step % self.config.eval_interval:
                arrived(self.step)
            self.save(needed=True)

    def _micro_batches(self) -> int:
        """Micro-batches of a window, over all ranks."""
        return self.job.world_size * self.engine.gradient_accumulation_steps

    def run(self) -> Outcome:
        """Train until the last step, until patience is out, or until a signal.

        Raises:
            RunError: too many skipped steps, or a last checkpoint that cannot be written.
        """
        self.progress = Progress(self.step, self.job.max_steps, speak=self.job.rank == 0)
        self._tick = time.monotonic()
        self._pace.start(self.step)
        self.engine.train()
        try:
            while True:
                if self.step >= self.job.max_steps:
                    return Outcome("finished")
                if self.config.patience is not None and self.best.misses >= self.config.patience:
                    self.progress.say(
                        f"no improvement in {self.best.misses} evaluations: stopping (patience)"
                    )
                    return Outcome("patience")
                self.time_left.round_began()
                rollcall.at(self.step + 1)
                self._profile.begin(self.step + 1)
                self._window()
                self.step += 1
                if self._profile.end(self.step):
                    self._advance_clock()
                    self._tell(self._profile.close())
                    self._tick = time.monotonic()  # writing a trace is no part of training
                self.progress.step()
                signum = self._after_step()
                if signum is not None:
                    return Outcome("stopped", signum)
        finally:
            if sys.exc_info()[0] is None:
                self._tell(self._profile.close())
            self.progress.close()

    def _window(self) -> None:
        """One optimizer step."""
        job, engine = self.job, self.engine
        gas = engine.gradient_accumulation_steps
        indices = global_batch(len(job.data.train), job.recipe.global_batch, job.seed, self.step)
        if self.seeds is not None:
            loss = engine.step(partial(self._evaluated, indices), job.objective.value)
            # The loss is that of all ranks; which of them has none that is finite, its own sums tell.
            finite = torch.isfinite(loss)
            self._sums[:2] += torch.stack([torch.where(finite, loss, 0.0), finite.to(loss)]).to(self._sums)
            self.seeds.add()
            self._tell(self._flat.update(self.step + 1, self.seeds.measures))
            return
        terms = sum(job.data.terms(index) for index in indices) / (job.world_size * gas)
        estimates.run(engine, partial(self._estimated, indices, terms))
        for batch in self._batches(indices):
            loss = job.data.loss_sum(engine(**batch.inputs), batch) / terms
            engine.backward(loss, terms=terms)
            if engine.wants_sampled_pass():
                engine.sampled_pass(partial(self._sampled, batch, terms))
            engine.step()
            self._add(loss.detach())
        estimates.judge(engine, partial(self._estimated, indices, terms))

    def _batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """This rank's micro-batches of a global batch."""
        job, gas = self.job, self.engine.gradient_accumulation_steps
        for part in micro_batches(indices, job.rank, job.world_size, gas):
            yield job.data.collate([job.data.train[index] for index in part], part).to(self.engine.device)

    def _estimated(self, indices: Sequence[int], terms: float) -> Iterator[estimates.MicroBatch]:
        """The same, for windows of estimation."""
        job = self.job
        for batch in self._batches(indices):
            yield job.data.micro_batch(self.engine, batch, terms, job.seed, self.step)

    def _evaluated(self, indices: Sequence[int]) -> Tensor:
        """Sums that the objective is a function of, over this rank's share of a global batch."""
        job, engine = self.job, self.engine
        if getattr(job.recipe.optimizer_config, "spread", False):
            parts = micro_batches(indices, 0, 1, job.world_size * engine.gradient_accumulation_steps)
        else:
            parts = micro_batches(indices, job.rank, job.world_size, engine.gradient_accumulation_steps)
        found = torch.stack([job.objective.sums(job.data, engine, part) for part in parts])
        self._sums[2] += (~torch.isfinite(found).all(dim=1)).sum()
        return found.sum(dim=0)

    def _sampled(self, batch: Batch, terms: float) -> Tensor:
        """Loss of a micro-batch at labels drawn from the model, over the terms of the global batch."""
        outputs = self.engine(**batch.inputs)
        return self.job.data.sampled_loss_sum(outputs, batch, self.job.seed, self.step) / terms

    def _add(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss)
        self._sums += torch.stack([torch.where(finite, loss, 0.0), finite, ~finite]).to(torch.float64)

    def _after_step(self) -> int | None:
        """Log, evaluate, save; the signal that ends the run, if any."""
        config, step = self.config, self.step
        last = step >= self.job.max_steps
        logging = last or step % self.log_interval == 0
        if logging:
            self._log_step()
        if last or step % config.eval_interval == 0:
            self.evaluate("validation")
        self.time_left.round_ended(evaluated=last or step % config.eval_interval == 0)
        if self.job.rank == 0 and not last:
            # One rank looks at its clock; the others hear of it as of a signal.
            evaluates = (step + 1) % config.eval_interval == 0 or step + 1 == self.job.max_steps
            reason = self.time_left.is_up(evaluates, saves=step % self.save_interval == 0)
            if reason is not None:
                self.stop.request(REQUEUE, reason)
        out_of_patience = config.patience is not None and self.best.misses >= config.patience
        signum = None
        if self._stop_device is not None:
            signum = self.stop.agreed(self._stop_device)
        elif logging:
            signum = self.stop.agreed(self.engine.device)
        needed = last or out_of_patience or signum is not None
        if needed or step % self.save_interval == 0:
            self.save(needed)
        return None if last else signum

    def _log_step(self) -> None:
        own = self._sums.tolist()
        self._sums.zero_()
        health = self.engine.health()
        every, ranks = zip(*gather_objects((own, self._pace.figures(self.step, health))), strict=True)
        finite = sum(count for _, count, _ in every)
        loss = sum(total for total, _, _ in every) / finite if finite else None
        bad = [int(count) for _, _, count in every]
        self._advance_clock()
        self.last_loss, self.last_health = loss, health
        line = {"step": self.step, "loss": loss, "lr": self.engine.lr(), "seconds": self.seconds, **health}
        self.engine.publish_figures({key: value for key, value in line.items() if key not in ("step", "lr")})
        line["ranks"] = ranks_entry(ranks)
        if any(bad):
            line["bad_losses"] = sum(bad)
        self.log.write(**line)
        self.progress.figures(self.step, line)
        if self._noop is not None:
            self._tell(self._noop.update(self.step, health))
        self._tell(self._guard.check(self.step, health, bad))

    def evaluate(self, split: str, again: bool = False) -> dict[str, float]:
        """Metrics on a split; on validation, the best weights are kept. Every rank calls it.

        Args:
            split: which.
            again: the log of metrics has it already; only rank 0 writes one and has to know.
        """
        job, engine = self.job, self.engine
        rollcall.at(self.step, "evaluating")
        engine.eval()
        size = self.config.eval_batch_size or engine.micro_batch_size
        metrics = job.data.evaluate(engine, split, size, job.rank, job.world_size, engine.device)
        engine.train()
        self._advance_clock()
        if not again:
            figures = {"split": split, "step": self.step, "metrics": metrics}
            self.log.write(step=self.step, seconds=self.seconds, eval=figures)
        words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        mark = ""
        if split == "validation" and self.best.improved_by(metrics):
            mark = "  (best)"
            try:
                self.best.keep(engine, self.step, metrics)
            except CheckpointError as error:
                self._tell(f"warning: {error}")
        self.progress.say(f"step {self.step}: {split}  {words}{mark}")
        return metrics

    def save(self, needed: bool) -> None:
        """Write a checkpoint; every rank calls it.

        Args:
            needed: the run ends here and a failure is an error; otherwise it is a warning.
        """
        self._advance_clock()
        began = time.monotonic()
        rollcall.at(self.step, "writing a checkpoint")
        state = {
            "seconds": self.seconds,
            "last_loss": self.last_loss,
            "skips": self._guard.state(),
            "noop": self._noop.state() if self._noop is not None else None,
            "best": self.best.state(),
            "micro_batches": self._micro_batches(),
        }
        own = {"rng": rng_state(), "sums": self._sums.cpu()}
        info = {"best_step": self.best.step}
        try:
            self.checkpoints.save(self.engine, self.step, state, own, info, self.best.step)
        except CheckpointError as error:
            if needed:
                raise
            self._tell(f"warning: {error}")
            return
        if rank() == 0:
            good, _ = find(self.checkpoints.directory)
            self.best.prune(one.info.get("best_step") for one in good)
        self.time_left.saved(time.monotonic() - began)

    def _advance_clock(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._tick
        self._tick = now

    def _tell(self, message: str | None) -> None:
        if message is not None:
            self.progress.say(message)
