"""`--check`: what would run, without starting it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dsso.diagnostics import jsonable, method_table
from launch.prepare import Job


def report(job: Job) -> str:
    """The resolved recipe, the table parameter -> method -> owner, and sizes, as text."""
    return "\n".join(_lines(job))


def _lines(job: Job) -> Iterator[str]:
    recipe = job.recipe
    yield "recipe, resolved:"
    yield json.dumps(jsonable(recipe.to_json()), indent=2)
    yield ""
    yield method_table(job.table)
    yield ""
    model = job.bundle.model
    parameters = list(model.parameters())
    total = sum(one.numel() for one in parameters)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    weights = sum(one.numel() * one.element_size() for one in parameters)
    yield f"output       {job.output_dir}"
    if job.resume.candidates:
        yield f"resume from  {job.resume.candidates[0].path}"
    yield from (f"skipped      {one.path}: {one.reason}" for one in job.resume.skipped)
    yield from (f"note         {note}" for note in job.resume.notes)
    yield from (f"note         {note}" for note in recipe.notes)
    zero = f", ZeRO stage {recipe.zero_stage}" if recipe.dsso.engine == "deepspeed" else ""
    yield f"engine       {recipe.dsso.engine}{zero}, {recipe.precision.dtype}, {job.world_size} rank(s)"
    yield (
        f"batch        {recipe.global_batch} = {recipe.micro_batch} a rank x {recipe.gas} accumulated"
        f" x {job.world_size} rank(s)"
    )
    sizes = ", ".join(f"{len(getattr(job.data, split))} {split}" for split in ("train", "validation", "test"))
    yield f"data         {sizes} ({job.task.source})"
    yield f"steps        {job.max_steps}"
    yield f"parameters   {total:,}, trained {trained:,} ({100 * trained / total:.2f} %)"
    yield f"weights      {_megabytes(weights)}"
    if recipe.is_method:
        yield f"method       {_megabytes(job.method_bytes)} of state on rank {job.rank}"
    yield "nothing was started (--check)"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
