"""Optimization methods: one file is one method, and the file's name is the `type` in a recipe.

`{"type": "KFAC"}` is `dsso.optim.kfac`, which offers `Config` (its parameters) and `Method` (what it does). Other
packages add methods through the entry-point group `dsso.optimizers`. Files whose name starts with an underscore,
and `base`, are shared machinery.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from dsso.errors import RecipeError
from dsso.optim._probes import ForwardMethod

ENTRY_POINTS = "dsso.optimizers"


@cache
def _known() -> dict[str, str]:
    """Lower-case type to the name of the module that holds it; looked up once, which reads every installed package."""
    found = {
        info.name: f"{__name__}.{info.name}"
        for info in pkgutil.iter_modules(__path__)
        if not info.name.startswith("_") and info.name != "base"
    }
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name.lower(), point.value)
    return found


def available() -> list[str]:
    """Types that a recipe may name, in capitals as the recipes write them."""
    return sorted(name.upper() for name in _known())


def is_forward(kind: str) -> bool:
    """Whether a type is that of a method that needs only losses.

    Args:
        kind: the recipe's `optimizer.type`; False for a baseline.
    """
    if kind.lower() not in _known():
        return False
    return issubclass(resolve(kind).Method, ForwardMethod)


def resolve(kind: str) -> ModuleType:
    """The module of a method.

    Args:
        kind: the recipe's `optimizer.type`; case does not matter.

    Raises:
        RecipeError: for an unknown type, with the nearest known one.
    """
    known = _known()
    if kind.lower() not in known:
        raise RecipeError("unknown optimizer", where="optimizer.type", got=kind, allowed=available())
    return importlib.import_module(known[kind.lower()])
