"""`--check`: what would run and what it needs, planned without weights; nothing is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsso.diagnostics import jsonable, method_table
from dsso.plan import Plan, plan, resolve, text
from dsso.recipe import ResolvedRecipe, load_recipe
from dsso.recipe_checks import batch_sizes
from dsso.seeding import seed_everything
from launch import resume as resuming
from launch.arguments import Arguments
from launch.prepare import max_steps, notes_on_sizes, output_directory

if TYPE_CHECKING:
    from dsso.engines import Environment
    from dsso.tasks import PreparedTask
    from dsso.tasks.base import Task


@dataclass(frozen=True)
class Checked:
    """A recipe that can be run.

    Attributes:
        recipe: resolved.
        plan: what it needs.
        task: what is learnt; without examples where the data is not here.
        data: tokenized; None where the data or the tokenizer is not here.
        steps: of the run; None where it depends on data that is not here.
        output_dir: where it would write.
        resume: how it would start.
    """

    recipe: ResolvedRecipe
    plan: Plan
    task: Task
    data: PreparedTask | None
    steps: int | None
    output_dir: Path
    resume: resuming.Resume


def check(arguments: Arguments, environment: Environment) -> Checked:
    """Validate all that can be validated without weights, and plan.

    The data is read where it is there. Where it is not, the plan is made all the same: it needs the task's labels only.

    Args:
        arguments: the command line.
        environment: this process among the launched ones.

    Raises:
        RecipeError: whatever cannot be used.
    """
    from dsso import tasks

    written = load_recipe(arguments.ds_config, arguments.overrides)
    config = written.dsso
    world = arguments.world_size or environment.world_size
    # Without a launcher a run has one device, whatever the recipe says; a number of ranks stands for a launcher.
    alone = environment.launcher == "none" and arguments.world_size is None
    _, _, global_batch = batch_sizes(written.raw, world)
    resolve(written, world)
    output_dir = output_directory(arguments, written)
    resume = resuming.plan(output_dir, arguments.resume, arguments.overwrite)

    seed_everything(config.train.seed)
    dtype = written.precision.torch_dtype
    try:
        task = tasks.load_task(config.task, config.train.seed)
    except tasks.DataMissing as error:
        task = tasks.without_data(config.task, config.train.seed, f"not here: {str(error).splitlines()[0]}")
    tasks.objectives.choose(config.train.objective, task.spec)
    bundle = tasks.outline.on_meta(config.model, config.peft, task, config.task, dtype)
    data = tasks.prepare(task, bundle, config.task) if task.train and bundle.tokenizer is not None else None
    steps = config.train.max_steps
    if steps is None and task.train:
        steps = max_steps(None, config.train.epochs, len(task.train), global_batch)
    recipe = resolve(written, world) if steps is None else written.resolved(world, steps)
    resume = resuming.compare(resume, jsonable(recipe.to_json()))
    if task.train:
        resume = replace(resume, notes=(*resume.notes, *notes_on_sizes(global_batch, len(task.train))))
    found = plan(bundle.model, written, world, arguments.gpu_memory, "single" if alone else None)
    return Checked(recipe, found, task, data, steps, output_dir, resume)


def report(checked: Checked) -> str:
    """The resolved recipe, the table parameter -> method -> owner, and the plan, as text."""
    return "\n".join(_lines(checked))


def _lines(checked: Checked) -> Iterator[str]:
    recipe, found = checked.recipe, checked.plan
    yield "recipe, resolved:"
    yield json.dumps(jsonable(recipe.to_json()), indent=2)
    yield ""
    yield method_table(found.rows)
    yield ""
    yield f"output       {checked.output_dir}"
    if checked.resume.candidates:
        yield f"resume from  {checked.resume.candidates[0].path}"
    yield from (f"skipped      {one.path}: {one.reason}" for one in checked.resume.skipped)
    yield from (f"note         {note}" for note in (*checked.resume.notes, *recipe.notes))
    yield (
        f"batch        {recipe.global_batch} = {recipe.micro_batch} a rank x {recipe.gas} accumulated"
        f" x {recipe.world_size} rank(s)"
    )
    yield f"data         {_data(checked)}"
    yield f"steps        {'not known: they follow from the data' if checked.steps is None else checked.steps}"
    yield text(found)
    yield "nothing was started (--check); no weights were read"


def _data(checked: Checked) -> str:
    if not checked.task.train:
        return checked.task.source
    sizes = ", ".join(f"{len(checked.task.split(one))} {one}" for one in ("train", "validation", "test"))
    tokens = "" if checked.data is not None else "; no tokenizer is here, so no example was encoded"
    return f"{sizes} ({checked.task.source}){tokens}"
