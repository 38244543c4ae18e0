"""All that can be decided and refused before a process group exists: recipe, data, model, directory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dsso import optim
from dsso.diagnostics import jsonable
from dsso.errors import RecipeError
from dsso.recipe import Recipe, ResolvedRecipe, load_recipe
from dsso.recipe_checks import batch_sizes
from dsso.seeding import seed_everything
from launch.arguments import Arguments
from launch.resume import Resume, compare, plan

if TYPE_CHECKING:
    from dsso.tasks import PreparedTask
    from dsso.tasks.base import Task
    from dsso.tasks.models import ModelBundle
    from dsso.tasks.objectives import Objective


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    arguments: Arguments
    recipe: ResolvedRecipe
    rank: int
    world_size: int
    task: Task
    bundle: ModelBundle
    data: PreparedTask
    objective: Objective
    output_dir: Path
    resume: Resume
    max_steps: int

    @property
    def seed(self) -> int:
        """`dsso.train.seed`."""
        return self.recipe.dsso.train.seed


def prepare(arguments: Arguments, rank: int, world_size: int) -> Job:
    """Validate all that can be validated, and load data and model.

    Args:
        arguments: the command line.
        rank: this process, as its launcher says.
        world_size: number of processes.

    Raises:
        RecipeError: whatever cannot be used.
    """
    from dsso import tasks

    written = load_recipe(arguments.ds_config, arguments.overrides)
    config = written.dsso
    _, _, global_batch = batch_sizes(written.raw, world_size)
    if config.train.max_steps is not None:
        written.resolved(world_size)  # what is wrong is told before data and model are read
    output_dir = output_directory(arguments, written)
    resume = plan(output_dir, arguments.resume, arguments.overwrite)

    seed_everything(config.train.seed)
    task = tasks.load_task(config.task, config.train.seed)
    objective = tasks.objectives.choose(config.train.objective, task.spec)
    dtype = written.precision.torch_dtype
    bundle = tasks.models.load(config.model, task, config.task, dtype)
    bundle = tasks.adapters.apply(bundle, config.peft)
    data = tasks.prepare(task, bundle, config.task)
    steps = max_steps(config.train.max_steps, config.train.epochs, len(data.train), global_batch)
    profiled = arguments.profile_steps
    if profiled is not None and profiled.first > steps:
        raise RecipeError(
            "the run takes none of these steps",
            where="--profile_steps",
            got=f"{profiled.first}:{profiled.last}",
            allowed=f"steps from 1 to {steps}",
        )
    recipe = written.resolved(world_size, steps)
    resume = compare(resume, jsonable(recipe.to_json()))
    resume = replace(resume, notes=(*resume.notes, *notes_on_sizes(global_batch, len(data.train))))
    _refuse(recipe, bundle.model, rank, world_size)
    return Job(
        arguments,
        recipe,
        rank,
        world_size,
        task,
        bundle,
        data,
        objective,
        output_dir,
        resume,
        steps,
    )


def output_directory(arguments: Arguments, recipe: Recipe) -> Path:
    """Where a run writes: the command line's, the recipe's, or one by the recipe's name."""
    if arguments.output_dir is not None:
        return arguments.output_dir
    if recipe.dsso.output_dir is not None:
        return Path(recipe.dsso.output_dir)
    return Path("runs") / arguments.ds_config.stem


def max_steps(steps: int | None, epochs: float | None, examples: int, global_batch: int) -> int:
    """Length of a run in optimizer steps; `steps` itself where it is given.

    Raises:
        RecipeError: neither steps nor epochs are given.
    """
    if steps is not None:
        return steps
    if epochs is None:
        raise RecipeError("exactly one of max_steps and epochs must be given", where="dsso.train")
    return max(1, math.ceil(epochs * examples / global_batch))


def notes_on_sizes(global_batch: int, examples: int) -> tuple[str, ...]:
    """What to tell about the sizes of batch and training set.

    Args:
        global_batch: examples of a step over all ranks.
        examples: of the training set.
    """
    if global_batch <= examples:
        return ()
    return (
        f"train_batch_size {global_batch} is larger than the training set ({examples} examples):"
        " every step takes some of them more than once",
    )


def _refuse(recipe: ResolvedRecipe, model: nn.Module, rank: int, world_size: int) -> None:
    """Refuse a model without work for the method, without allocating."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("no parameter of the model is trainable", where="dsso.peft")
    if recipe.is_method and not optim.is_forward(recipe.optimizer_type):
        resolved = optim.resolve(recipe.optimizer_type)
        resolved.Method(recipe.optimizer_config, model, torch.device("meta"), rank, world_size).close()
