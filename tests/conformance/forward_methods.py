"""The methods from forward passes as they are found, with every choice of words that their parameters offer."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dsso.optim import available, is_forward, resolve

METHODS = tuple(name for name in available() if is_forward(name))
"""Types of recipes, in capitals."""


def required(kind: str) -> dict[str, Any]:
    """What a method cannot be made without; whole numbers all of them, of steps so far."""
    fields: dict[str, FieldInfo] = resolve(kind).Config.model_fields
    return {name: 6 for name, field in fields.items() if field.is_required()}


def variants(kind: str) -> dict[str, dict[str, Any]]:
    """Settings by name: the defaults, and each value of each field that has a list of words, if it is accepted."""
    out = {"plain": required(kind)}
    for name, field in resolve(kind).Config.model_fields.items():
        words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        for word in words:
            given = {**required(kind), name: word}
            if word != field.default and _accepted(kind, given):
                out[f"{name} {word}"] = given
    return out


def _accepted(kind: str, given: dict[str, Any]) -> bool:
    try:
        resolve(kind).Config(**given)
    except ValidationError:
        return False
    return True


CASES = {f"{kind}-{name}": (kind, given) for kind in METHODS for name, given in variants(kind).items()}
