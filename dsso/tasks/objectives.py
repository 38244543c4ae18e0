"""What a method that needs only losses lowers: the loss, 1 - a metric, or a function of the user's own.

An objective gives a vector of sums over the examples of a micro-batch. Sums are added up over micro-batches and ranks,
and one pure function of the totals is the value, so that how a batch was split changes nothing. (A mean of accuracies
of uneven parts is not the accuracy of the whole, and a mean of F1 is not even near.)

    loss          sum of the losses, loss terms      their ratio
    accuracy      right answers, examples            1 - right / examples
    f1            tp, fp, fn of class 1              1 - 2 tp / (2 tp + fp + fn); F1 is 0 where there is none of them
    exact_match   texts that match, examples         1 - matches / examples
    text_f1       F1 of each text, examples          1 - sum / examples
    module:name   what the function returns          see `from_module`

Metrics are those of `metrics.py`, on the predictions of `evaluate.py`. Where a score is not a number, neither are the
sums: such a step is skipped as one with a loss that is not finite. Metrics as objectives: Malladi et al. 2023, section
3.3 (accuracy, and the F1 of texts).

Dimensions: B examples, P evaluations, m sums.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsso.config import OBJECTIVES
from dsso.errors import RecipeError, RunError
from dsso.parallel.collectives import world_size
from dsso.tasks.base import TaskSpec
from dsso.tasks.evaluate import class_scores, written
from dsso.tasks.metrics import total

if TYPE_CHECKING:
    from dsso.engines.protocol import Engine
    from dsso.tasks.prepared import PreparedTask

WHERE = "dsso.train.objective"

Sums = Callable[["PreparedTask", "Engine", Sequence[int]], Tensor]
"""`sums(ready, engine, indices)`: sums `[m]` over a micro-batch of training examples, fp64, on the engine's device."""


@dataclass(frozen=True)
class Objective:
    """What is lowered."""

    name: str
    """As the recipe writes it."""
    sums: Sums
    """Sums of a micro-batch; makes the same number of forward passes on every rank."""
    value: Callable[[Tensor], Tensor] | None = None
    """Values `[P]` from the totals `[P, m]`; None: the first sum over the second."""


def choose(name: str, spec: TaskSpec) -> Objective:
    """The objective of a recipe.

    Args:
        name: `dsso.train.objective`.
        spec: the task.

    Raises:
        RecipeError: the task cannot be judged so, or there is no such function.
    """
    if ":" in name:
        return from_module(name)
    allowed = _fitting(spec)
    if name not in allowed:
        raise RecipeError(
            f"the task {spec.name!r} cannot be judged so: {_why_not(name, spec)}",
            where=WHERE,
            got=name,
            allowed=[*allowed, "module:function"],
            remedy=f"set it to {allowed[-1]!r}, or take another task",
        )
    return _OBJECTIVES[name]


def _fitting(spec: TaskSpec) -> list[str]:
    """Names that suit a task."""
    if spec.kind == "regression":
        return ["loss"]
    if spec.kind == "text":
        return ["loss", "exact_match", "text_f1"]
    return ["loss", *(["f1"] if len(spec.labels) == 2 else []), "accuracy"]


def _why_not(name: str, spec: TaskSpec) -> str:
    if name in ("exact_match", "text_f1"):
        return f"{name} compares texts that the model has written, and its answers are {_ANSWERS[spec.kind]}"
    if spec.kind == "classification":
        return f"F1 is that of two classes, and it has {len(spec.labels)}"
    return f"{name} counts classes, and its answers are {_ANSWERS[spec.kind]}"


_ANSWERS = {"classification": "classes", "regression": "numbers", "text": "free text"}


# -- the loss and the metrics --------------------------------------------------------------------------------------


def _loss(ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> Tensor:
    batch = ready.collate([ready.train[index] for index in indices], indices).to(engine.device)
    found = ready.loss_sum(engine(**batch.inputs), batch).to(torch.float64)
    return torch.stack([found, torch.full_like(found, batch.terms)])


def _classes(ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and right classes `[B]`, and what to add to sums: 0, or NaN where a score is not finite."""
    encoded = [ready.train[index] for index in indices]
    scores_BC = class_scores(ready, engine, encoded, indices, engine.device)
    labels = torch.tensor([one["label"] for one in encoded], device=engine.device)
    return scores_BC.argmax(dim=-1), labels, _poison(~torch.isfinite(scores_BC).all())


def _poison(bad: Tensor) -> Tensor:
    # The largest of scores that are not numbers is some class; it would count as an answer.
    return torch.zeros((), dtype=torch.float64, device=bad.device).masked_fill(bad, torch.nan)


def _accuracy(ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> Tensor:
    made, wanted, poison = _classes(ready, engine, indices)
    right = (made == wanted).sum()
    return torch.stack([right, torch.full_like(right, len(indices))]).to(torch.float64) + poison


def _f1(ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> Tensor:
    made, wanted, poison = _classes(ready, engine, indices)
    counts = [(made == 1) & (wanted == 1), (made == 1) & (wanted != 1), (made != 1) & (wanted == 1)]
    return torch.stack(counts).sum(dim=1).to(torch.float64) + poison


def _texts(metric: str, ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> Tensor:
    bad = torch.zeros((), dtype=torch.bool, device=engine.device)

    def watch(scores: Tensor) -> None:
        bad.logical_or_(torch.isnan(scores).any())

    encoded = [ready.train[index] for index in indices]
    made = written(ready, engine, encoded, world_size(), engine.device, watch)
    found = total(metric, ready.task.spec, made, [ready.task.train[index] for index in indices])
    return torch.tensor([found, len(indices)], dtype=torch.float64, device=engine.device) + _poison(bad)


def _one_minus_ratio(sums_Pm: Tensor) -> Tensor:
    return 1.0 - sums_Pm[:, 0] / sums_Pm[:, 1]


def _one_minus_f1(sums_Pm: Tensor) -> Tensor:
    tp, fp, fn = sums_Pm.unbind(dim=1)
    below = 2 * tp + fp + fn
    # As in `metrics.py`, F1 is 0 where it is undefined.
    return 1.0 - 2 * tp / below.masked_fill(below == 0, 1.0)


_OBJECTIVES = {
    "loss": Objective("loss", _loss),
    "accuracy": Objective("accuracy", _accuracy, _one_minus_ratio),
    "f1": Objective("f1", _f1, _one_minus_f1),
    "exact_match": Objective("exact_match", partial(_texts, "exact_match"), _one_minus_ratio),
    "text_f1": Objective("text_f1", partial(_texts, "text_f1"), _one_minus_ratio),
}
assert tuple(_OBJECTIVES) == OBJECTIVES


# -- a function of the user's own ----------------------------------------------------------------------------------


def from_module(name: str) -> Objective:
    """A user's objective.

    The function is called as `function(outputs, batch)` for every micro-batch, with what the model returned and a
    `dsso.tasks.Batch`, without gradients. It returns a 1-D tensor of sums, always of the same length. What is lowered
    is the first over the second of two; with an attribute `value`, a function too, it is `value(sums)` instead, one
    number for the totals `[m]` (fp64). So an object with `__call__` and `value` does as well.

    Args:
        name: `module:function`; the module is looked for where Python looks, and in the current directory.

    Raises:
        RecipeError: no such module or function, or one that cannot be called so.
    """
    path, _, attribute = name.partition(":")
    module = _import(path, name)
    function = getattr(module, attribute, None)
    if function is None:
        names = [key for key, one in vars(module).items() if callable(one) and not key.startswith("_")]
        raise RecipeError(
            f"the module {path!r} ({getattr(module, '__file__', 'built in')}) has no such function",
            where=WHERE,
            got=attribute,
            allowed=names or "it has no function",
            remedy="correct the name behind the colon",
        )
    value = getattr(function, "value", None)
    if not _takes(function, 2) or not (value is None or _takes(value, 1)):
        raise RecipeError(
            "cannot be called as function(outputs, batch)"
            if not _takes(function, 2)
            else "its attribute 'value' cannot be called as value(sums)",
            where=WHERE,
            got=name,
            allowed="function(outputs, batch) -> sums, and optionally function.value(sums) -> number",
            remedy="see 'Objectives' in docs/recipe.md",
        )
    own = _Own(name, function, value)
    return Objective(name, own.sums, None if value is None else own.value)


def _import(path: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
        raise RecipeError(
            f"there is no module {error.name!r}",
            where=WHERE,
            got=name,
            allowed=f"a module that Python finds, or a file in {here}",
            remedy="start in the directory of the file, or name its directory in PYTHONPATH",
        ) from error
    except Exception as error:  # whatever the user's module does when it is read
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"the module cannot be imported ({type(error).__name__}: {error})",
        where=WHERE,
        got=name,
        remedy="correct the module",
    )


def _takes(function: Any, count: int) -> bool:
    """Whether something can be called with so many arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # compiled functions do not tell
        return True
    return True


class _Own:
    """Calls a user's function and checks what it returns.

    Args:
        name: for messages.
        function: of outputs and batch.
        value: of sums, or None.
    """

    def __init__(self, name: str, function: Callable[..., Any], value: Callable[..., Any] | None) -> None:
        self.name, self._function, self._value = name, function, value
        self._length = 2 if value is None else None

    def sums(self, ready: PreparedTask, engine: Engine, indices: Sequence[int]) -> Tensor:
        """See `Sums`.

        Raises:
            RunError: what was returned is no vector of sums of the right length.
        """
        batch = ready.collate([ready.train[index] for index in indices], indices).to(engine.device)
        found = self._function(engine(**batch.inputs), batch)
        if not isinstance(found, Tensor) or found.dim() != 1 or not found.numel() or found.is_complex():
            raise RunError(
                f"{self.name} must return sums over the micro-batch as one vector",
                where=WHERE,
                got=f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__,
                allowed="a real tensor with one dimension, and at least one number",
                remedy="return torch.stack([sum, count])",
            )
        if self._length is None:
            self._length = found.numel()
        if found.numel() != self._length:
            own = self._value is not None
            raise RunError(
                f"{self.name} returned another number of sums than before"
                if own
                else f"{self.name} must return two numbers, whose ratio is lowered",
                where=WHERE,
                got=found.numel(),
                allowed=str(self._length),
                remedy="return a vector of the same length for every micro-batch"
                if own
                else "return torch.stack([sum, count]), or give the function an attribute 'value' that makes one number"
                " of the sums",
            )
        return found.to(engine.device, torch.float64)

    def value(self, sums_Pm: Tensor) -> Tensor:
        """Values `[P]`.

        Raises:
            RunError: the user's `value` returned something else than a number.
        """
        assert self._value is not None
        values = []
        for row in sums_Pm:
            if not bool(torch.isfinite(row).all()):
                # The step is skipped; what a user's function would make of it is not its business.
                values.append(torch.full_like(row[0], torch.nan))
                continue
            found = self._value(row)
            one = isinstance(found, int | float) or (isinstance(found, Tensor) and found.numel() == 1)
            if not one:
                raise RunError(
                    f"{self.name}.value must return one number",
                    where=WHERE,
                    got=f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__,
                    allowed="a scalar: the smaller, the better",
                    remedy="return a scalar, such as 1 - sums[0] / sums[1]",
                )
            values.append(torch.as_tensor(found, dtype=sums_Pm.dtype, device=sums_Pm.device).reshape(()))
        return torch.stack(values)
