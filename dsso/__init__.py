"""Second-order and zeroth-order optimization of large transformers inside the engines that train them.

engine, optimizer, loader, scheduler = dsso.initialize(model=model, config="recipe.json")
for batch in loader:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()

In a Trainer of Hugging Face: `dsso.attach(trainer)`, and `dsso.ForwardTrainer` for methods without gradients.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dsso._version import __version__
from dsso.engines import build, launch_environment, start
from dsso.engines.base import EngineBase
from dsso.optim._partition import PartitionOptimizer
from dsso.recipe import load_recipe

if TYPE_CHECKING:
    from dsso.engines.hf_forward import ForwardTrainer
    from dsso.engines.hf_trainer import attach

__all__ = ["ForwardTrainer", "__version__", "attach", "initialize"]

_LAZY = {"attach": "dsso.engines.hf_trainer", "ForwardTrainer": "dsso.engines.hf_forward"}
"""What is about the Trainer of Hugging Face, which takes seconds to import: name -> module."""


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


_OF_THE_CALLER = ("model", "peft", "task")
"""Parts of a recipe's `"dsso"` section that a caller of `initialize` brings along."""


def initialize(
    model: nn.Module,
    config: str | Path | Mapping[str, Any],
    training_data: Dataset[Any] | None = None,
    collate_fn: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> tuple[EngineBase, PartitionOptimizer, DataLoader[Any] | None, Any]:
    """Put a model into the engine that a recipe names, with the recipe's optimizer.

    The model is used as it is: `dsso.model`, `dsso.peft` and `dsso.task` of the recipe are not read (of `dsso.model`
    only `dtype`), which rank 0 says on stderr when the recipe has them. `launch/train.py` is what builds a model from
    a recipe.

    Args:
        model: the model, adapters added and `requires_grad` flags set.
        config: a recipe, or the path of one.
        training_data: a data set for the returned loader; each rank sees its own share.
        collate_fn: of the loader.
        example_inputs: keyword arguments of a small forward pass, from which K-FAC learns which layers read the same
            tensor; None: made up for a Hugging Face model, other models share no factor.

    Returns:
        `(engine, optimizer, loader, scheduler)` as `deepspeed.initialize` returns them; loader and scheduler are
        None where there is none. `engine.backward(loss, terms=n)` takes the number of loss terms behind a mean
        loss; where the model is given labels, it is counted from them.

    Raises:
        RecipeError: for a recipe that cannot be used; nothing was started.
    """
    recipe = load_recipe(config)
    environment = launch_environment()
    given = [f"dsso.{name}" for name in _OF_THE_CALLER if name in recipe.raw.get("dsso", {})]
    if given and environment.rank == 0:
        sys.stderr.write(
            f"note: not used by dsso.initialize, which takes the model as it is: {', '.join(given)} of the recipe\n"
        )
    if recipe.dsso.train.objective != "loss" and environment.rank == 0:
        sys.stderr.write(
            "note: dsso.train.objective is not used by dsso.initialize: what is lowered is what the loop gives to"
            " engine.step(closure, value)\n"
        )
    resolved = recipe.resolved(environment.world_size)
    train = resolved.dsso.train
    start(environment, train.timeout_minutes, train.interface)
    engine = build(model, resolved, environment, example_inputs)
    loader: DataLoader[Any] | None = None
    if training_data is not None:
        sampler: DistributedSampler[Any] | None = None
        if environment.world_size > 1:
            sampler = DistributedSampler(training_data, environment.world_size, environment.rank)
        loader = DataLoader(
            training_data,
            resolved.micro_batch,
            shuffle=sampler is None,
            sampler=sampler,
            collate_fn=collate_fn,
            drop_last=True,
        )
    return engine, engine.optimizer, loader, getattr(engine, "scheduler", None)
