"""The best weights on the validation set: trainable parameters only, one safetensors file an improvement.

Files carry their step, so that a checkpoint and the weights that it calls the best always belong together;
those that no checkpoint refers to are removed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from dsso.checkpoint import CheckpointError, write_json
from dsso.files import save_file
from dsso.parallel.collectives import gather_objects, rank

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine

_FILE = re.compile(r"step_(\d+)\.safetensors")


class Best:
    """Keeps the best weights.

    Args:
        directory: `output_dir/best`.
        metric: name of the metric that decides; larger is better, except for `loss`.
    """

    def __init__(self, directory: Path, metric: str) -> None:
        self.directory = directory
        self.metric = metric
        self.step: int | None = None
        self.value: float | None = None
        self.misses = 0
        """Evaluations since the last improvement."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "value": self.value, "misses": self.misses}

    def restore(self, state: Mapping[str, Any], origin: Path | None) -> None:
        """Put back what `state` gave.

        Args:
            state: from a checkpoint.
            origin: `best/` of the run that wrote it; its file is copied when that is another one.
        """
        self.step, self.value, self.misses = state["step"], state["value"], state["misses"]
        if self.step is None or origin is None or origin.resolve() == self.directory.resolve():
            return
        if rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin / _name(self.step), self.directory)

    def improved_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are better than all before; counts the misses."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            better = False
        elif self.value is None:
            better = True
        else:
            better = value < self.value if self.metric == "loss" else value > self.value
        self.misses = 0 if better else self.misses + 1
        return better

    def keep(self, engine: Engine, step: int, metrics: Mapping[str, float]) -> None:
        """Write the current weights as the best; every rank calls it.

        Raises:
            CheckpointError: on every rank when they could not be written; the best before stays.
        """
        weights = engine.gathered_state_dict()
        problem = None
        if rank() == 0:
            try:
                save_weights(self.directory / _name(step), weights)
                write_json(
                    self.directory / "best.json",
                    {"step": step, "metric": self.metric, "value": metrics[self.metric], "file": _name(step)},
                )
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
        problem = gather_objects(problem)[0]
        if problem is not None:
            raise CheckpointError(
                f"the best weights (step {step}) could not be written ({problem})",
                where=str(self.directory),
                remedy="make room on the disk",
            )
        self.step, self.value = step, metrics[self.metric]

    def weights(self) -> dict[str, Tensor] | None:
        """The best weights from the disk, on the CPU; None where no evaluation gave a finite metric."""
        if self.step is None:
            return None
        found: dict[str, Tensor] = safetensors.torch.load_file(self.directory / _name(self.step))
        return found

    def prune(self, steps: Iterable[int | None]) -> None:
        """Remove, on rank 0, the files of all other steps."""
        kept = {self.step, *steps}
        if rank() == 0 and self.directory.is_dir():
            for path in self.directory.iterdir():
                found = _FILE.fullmatch(path.name)
                if found and int(found[1]) not in kept:
                    path.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    try:
        # clones: safetensors refuses tensors that share their memory
        save_file({name: one.detach().clone().contiguous() for name, one in weights.items()}, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _name(step: int) -> str:
    return f"step_{step:08d}.safetensors"
