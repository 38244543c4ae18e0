"""A model without weights: what a plan needs of it."""

from __future__ import annotations

import torch

from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.tasks import adapters
from dsso.tasks.base import Task
from dsso.tasks.models import ModelBundle, dtype_of, load


def on_meta(
    model_config: ModelConfig,
    peft_config: PeftConfig,
    task: Task,
    task_config: TaskConfig,
    dtype: torch.dtype | None = None,
) -> ModelBundle:
    """The model of a recipe with its adapters on the meta device: shapes without weights.

    Of a hub model or a directory only the configuration is read. The tokenizer is None where there is none.

    Args:
        model_config: the recipe's `dsso.model`.
        peft_config: the recipe's `dsso.peft`.
        task: decides the number of labels; it needs no examples.
        task_config: decides between a classification head and prompts.
        dtype: type of all weights, those of adapters included, when `model_config.dtype` is `auto`.

    Raises:
        RecipeError: as `load` and `adapters.apply` do, except for what only the weights tell.
    """
    architecture = model_config.model_copy(update={"init": "random"})
    with torch.device("meta"):
        bundle = load(architecture, task, task_config, dtype, need_tokenizer=False)
        bundle = adapters.apply(bundle, peft_config)
    # Whatever a library has made elsewhere, and adapters that it makes in fp32.
    bundle.model.to(device="meta", dtype=dtype_of(model_config, dtype))
    return bundle
