"""Errors that a user can act upon: what is wrong, where, what was given, what is allowed, what to do.

`RecipeError` is raised before anything is trained (exit status 2); `RunError` while a run is under way (exit status 1).
Both are printed by `launch/train.py` without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `word`, or None when nothing is close.

    Args:
        word: what the user wrote.
        options: what would have been accepted.
    """
    names = [str(option) for option in options]
    lowered = {name.lower(): name for name in names}
    if word.lower() in lowered:
        return lowered[word.lower()]
    found = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


class DssoError(Exception):
    """An error with a message for the user.

    Args:
        what: one sentence that says what is wrong.
        where: the place, e.g. `optimizer.params.damping` or `train.jsonl line 17`.
        got: the offending value.
        allowed: what would have been accepted; a list is also used for the "nearest" hint.
        remedy: one sentence that says what to do.
    """

    exit_status = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: str | Iterable[object] | None = None,
        remedy: str | None = None,
    ) -> None:
        parts = [f"{where}: {what}" if where else what]
        if got is not None:
            parts.append(f"got: {got!r}")
        if allowed is not None:
            if isinstance(allowed, str):
                parts.append(f"allowed: {allowed}")
            else:
                options = [str(option) for option in allowed]
                hint = nearest(str(got), options) if got is not None else None
                if hint is not None:
                    parts.append(f"nearest: {hint!r}")
                parts.append(f"allowed: {', '.join(options)}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("\n  ".join(parts))


class RecipeError(DssoError, ValueError):
    """The recipe, the command line, an input file or the output directory cannot be used; nothing was trained."""

    exit_status = 2


class RunError(DssoError, RuntimeError):
    """A run cannot go on."""


class OtherRankError(RunError):
    """Raised on the ranks that were well when another one was not, so that none goes on alone."""
