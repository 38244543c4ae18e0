"""What DeepSpeed tells of a run by keys of its own: where they work, and what they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from dsso.config import removal
from dsso.errors import RecipeError
from dsso.recipe_checks import lookup

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Monitors that DeepSpeed has by another package, and which."""
_OF_TRAINING_STEPS = {
    "tensorboard.enabled": "metrics.jsonl has all figures",
    "csv_monitor.enabled": "metrics.jsonl has all figures",
    "wandb.enabled": "metrics.jsonl has all figures",
    "comet.enabled": "metrics.jsonl has all figures",
    "flops_profiler.enabled": "--profile_steps shows where the time goes",
    "comms_logger.enabled": "--profile_steps shows where the time goes",
    "wall_clock_breakdown": "--profile_steps shows where the time goes",
    "memory_breakdown": "the lines of metrics.jsonl have the memory of every rank",
}
"""What DeepSpeed's own training step does, and what does the same without it."""


def check_monitors(raw: Mapping[str, Any], method: str, forward: bool) -> None:
    """Refuse monitors and profilers of DeepSpeed that would stay silent, or stop the run when it starts.

    Args:
        raw: the recipe.
        method: `optimizer.type`.
        forward: it needs only losses.

    Raises:
        RecipeError: the method takes no training step of DeepSpeed's, or a package is missing.
    """
    for path, instead in _OF_TRAINING_STEPS.items():
        if forward and lookup(raw, path) is True:
            raise RecipeError(
                f"is written by DeepSpeed's training step, and {method} takes none of those: it needs no gradients",
                where=path,
                got=True,
                remedy=f"{removal(path.partition('.')[0])}; {instead}",
            )
    for section, package in _PACKAGES.items():
        if lookup(raw, f"{section}.enabled") is True and importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"needs the package {package}, which is not installed",
                where=f"{section}.enabled",
                remedy=f"pip install {package}, or {removal(section)}",
            )
