"""Random numbers of a process: they decide how random weights begin, and which activations dropout takes."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0, step: int = 0) -> None:
    """Seed python, numpy and torch; ranks get streams of their own (dropout), rank 0 at step 0 the seed itself.

    Args:
        seed: of the recipe.
        rank: this process.
        step: where streams begin that cannot go on, because there are other ranks than before.
    """
    mixed = (seed + 1_000_003 * rank + 7_368_787 * step) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
