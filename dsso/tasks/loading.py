"""From a task's name to its examples, split as the protocol asks.

Protocol `paper` (Mahabadi et al. 2021, arXiv:2106.04647, §4; the test sets of GLUE and SuperGLUE are not
public): with fewer than 10,000 training examples the validation set is halved into validation and test;
otherwise 1,000 training examples become validation and the old validation set is the test. Protocol
`official`: the splits as published; where there is no labelled test set, the validation set is also the
test.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from dsso.config import TaskConfig, removal
from dsso.errors import RecipeError
from dsso.tasks import builtin, glue, superglue, text
from dsso.tasks.base import Example, Task, TaskSpec
from dsso.tasks.source import Source, open_source, to_examples

SMALL = 10_000
"""Training sets below this size lose half of their validation set to the test."""
HELD_OUT = 1_000
"""Training examples that become the validation set of a larger task."""

SPECS: dict[str, TaskSpec] = {
    spec.name: spec for spec in (builtin.SPEC, *glue.SPECS, *superglue.SPECS, *text.SPECS)
}
"""All tasks by name."""

_T = TypeVar("_T")


def available() -> list[str]:
    """Names of all tasks."""
    return sorted(SPECS)


def load_task(config: TaskConfig, seed: int) -> Task:
    """Read the examples of a task and split them.

    Args:
        config: the recipe's `dsso.task`.
        seed: decides which examples are held out and which are kept under a limit.

    Raises:
        RecipeError: the task, a split, a column or a label does not exist, or a file is damaged.
    """
    spec = _spec(config)
    if spec is builtin.SPEC:
        source_name, public = "generated", _generated(config, seed)
    else:
        source = open_source(spec, config.data_dir)
        source_name, public = source.where, _public_splits(spec, source, config)
    train, validation, test = split(public, config.protocol, seed)
    return Task(
        spec=spec,
        train=_limited(train, config.train_examples, seed, "train"),
        validation=_limited(validation, config.eval_examples, seed, "validation"),
        test=_limited(test, config.eval_examples, seed, "test"),
        seed=seed,
        source=source_name,
    )


def without_data(config: TaskConfig, seed: int, reason: str) -> Task:
    """A task that knows its labels and has no examples: enough to build a model for it.

    Args:
        config: the recipe's `dsso.task`.
        seed: of the recipe.
        reason: why there are none, told in the place of their source.

    Raises:
        RecipeError: the task does not exist.
    """
    return Task(_spec(config), (), (), (), seed, reason)


def _spec(config: TaskConfig) -> TaskSpec:
    spec = SPECS.get(config.name)
    if spec is None:
        raise RecipeError(
            "there is no such task", where="dsso.task.name", got=config.name, allowed=available()
        )
    return spec


def split(
    public: dict[str, list[Example]], protocol: str, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, validation and test set from the public splits; a pure function.

    Args:
        public: `train`, `validation` and, for the official protocol where it is labelled, `test`.
        protocol: `paper` or `official`.
        seed: decides which examples are held out.
    """
    train, validation = public["train"], public["validation"]
    if protocol == "official":
        return train, validation, public.get("test", validation)
    if len(train) < SMALL:
        shuffled = shuffle(validation, f"{seed}/halves")
        half = len(shuffled) // 2
        if half == 0:
            raise RecipeError(
                "the validation set has a single example and cannot be halved into validation and test",
                where="dsso.task.protocol",
                got=protocol,
                remedy='set it to "official", or bring more validation examples',
            )
        return train, shuffled[:half], shuffled[half:]
    shuffled = shuffle(train, f"{seed}/held out")
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT], validation


def shuffle(items: Sequence[_T], key: str) -> list[_T]:
    """A permutation of `items` that depends on `key` alone; the global generator is untouched."""
    shuffled = list(items)
    random.Random(key).shuffle(shuffled)
    return shuffled


def _generated(config: TaskConfig, seed: int) -> dict[str, list[Example]]:
    for name in ("data_dir", "columns"):
        if getattr(config, name) is not None:
            raise RecipeError(
                "the builtin task generates its examples and reads no files",
                where=f"dsso.task.{name}",
                got=getattr(config, name),
                remedy=removal(f"dsso.task.{name}", ", or name another task"),
            )
    return builtin.generate(seed)


def _public_splits(spec: TaskSpec, source: Source, config: TaskConfig) -> dict[str, list[Example]]:
    public = {}
    for name in ("train", "validation"):
        actual = source.resolve(name, spec)
        if actual is None:
            raise RecipeError(
                f"the split {name!r} of the task {spec.name!r} does not exist",
                where=source.where,
                got=f"{name}.jsonl is missing",
                allowed=f"present: {', '.join(source.available)}",
                remedy=f"put {name}.jsonl there, or choose another directory (dsso.task.data_dir)",
            )
        public[name] = to_examples(spec, source.read(actual), config.columns)
    if config.protocol == "official":
        actual = source.resolve("test", spec)
        # the hub's test sets of GLUE and SuperGLUE hold only -1
        hidden = source.where.startswith("hub ") and spec.hub in {glue.HUB, superglue.HUB}
        if actual is not None and not hidden:
            public["test"] = to_examples(spec, source.read(actual), config.columns)
    return public


def _limited(examples: list[Example], limit: int | None, seed: int, name: str) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    # files may be ordered by topic: a random subset, not the first rows
    return shuffle(examples, f"{seed}/{name} limit")[:limit]
