"""Names for the parts of a step in a profile; without a profiler they cost a look at one flag.

`with phase("reduce"):` is `torch.profiler.record_function("dsso::reduce")` while a profiler of torch's is on, whoever
has started it, and a shared context that does nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

PREFIX = "dsso::"
"""Before the names of phases in traces."""
PHASES = {
    "capture": "statistics of layers, within the backward pass",
    "reduce": "statistics on their way to their owners, and waiting for them",
    "factorize": "factorizations of what is due, their moving average excluded",
    "gather": "gradients on their way to the ranks that work on them",
    "precondition": "from gradients to updates",
    "clip": "the one reduction of a step, and the bound on it",
    "write back": "updates on their way to the ranks that hold the weights",
    "base rule": "SGD or AdamW on the pieces that a rank holds",
    "evaluate": "losses at perturbed weights, forward passes included",
    "noise": "random directions, made and added to weights",
    "move": "weights moved along the directions",
}
"""What there is, and what it is."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_NOTHING: AbstractContextManager[Any] = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """A context that names what runs within it, for a profiler that is on.

    Args:
        name: one of `PHASES`.
    """
    if _profiler_enabled():
        return record_function(PREFIX + name)
    return _NOTHING


def phased(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """The same for a whole function.

    Args:
        name: one of `PHASES`.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def named(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not _profiler_enabled():
                return function(*args, **kwargs)
            with record_function(PREFIX + name):
                return function(*args, **kwargs)

        return named

    return decorate
