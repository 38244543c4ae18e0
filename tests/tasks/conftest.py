"""Small tasks, and every step from a recipe's sections to a prepared task in one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsso import tasks
from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.tasks.base import Task
from dsso.tasks.models import ModelBundle
from dsso.tasks.prepared import PreparedTask


@dataclass
class Made:
    task: Task
    bundle: ModelBundle
    ready: PreparedTask

    def batch(self, count: int = 4) -> tasks.Batch:
        indices = list(range(count))
        return self.ready.collate([self.ready.train[index] for index in indices], indices)


@pytest.fixture
def make() -> Callable[..., Made]:
    def make(
        model: Mapping[str, Any] | str, peft: Mapping[str, Any] | None = None, seed: int = 0, **task: Any
    ) -> Made:
        task_config = TaskConfig(**{"max_length": 200, "train_examples": 40, "eval_examples": 11, **task})
        loaded = tasks.load_task(task_config, seed)
        model_config = ModelConfig(**({"name": model} if isinstance(model, str) else model))
        bundle = tasks.models.load(model_config, loaded, task_config)
        bundle = tasks.adapters.apply(bundle, PeftConfig(**(peft or {})))
        return Made(loaded, bundle, tasks.prepare(loaded, bundle, task_config))

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes `<name>.jsonl` files below a directory and returns it."""

    def write(directory: str, **splits: Iterable[Any] | str) -> Path:
        folder = tmp_path / directory
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return folder

    return write
