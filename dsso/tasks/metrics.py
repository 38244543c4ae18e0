"""Metrics by name, computed from all predictions of a split at once.

All are between -1 and 1, larger is better, and 0 where they are undefined (a correlation with a constant).
`text_f1` and `exact_match` are those of SQuAD (Rajpurkar et al. 2016): lower case, no articles, no
punctuation, the best of the accepted answers. `group_exact_match` is the share of groups in which every
example is right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from dsso.errors import RecipeError
from dsso.tasks.base import Example, TaskSpec

Prediction = int | float | str
"""A class, a value, or a text."""


def require_torchmetrics() -> None:
    """Check that torchmetrics is there, before anything starts.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "torchmetrics is not installed",
            where="dsso.task",
            remedy="in the project's folder: pip install -c constraints.txt -e '.[metrics]'",
        ) from error


def compute(
    spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]
) -> dict[str, float]:
    """All metrics of a task.

    Args:
        spec: the task.
        predictions: one for each example, in order.
        examples: the examples of the split.

    Raises:
        ValueError: the numbers differ.
    """
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    return {name: _finite(_METRICS[name](spec, predictions, examples)) for name in spec.metrics}


def total(name: str, spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """Sum over examples of a metric that is a mean over them, so that parts can be added up.

    Args:
        name: `text_f1` or `exact_match`.
        spec: the task.
        predictions: one for each example, in order.
        examples: the examples.
    """
    found = _METRICS[name](spec, predictions, examples) * len(examples)
    # a mean in float32 is not a whole number of matches any more
    return float(round(found)) if name == "exact_match" else found


def _finite(value: float) -> float:
    # torchmetrics counts in float32: seven digits are what there is
    return round(value, 7) if math.isfinite(value) else 0.0


def _classes(
    predictions: Sequence[Prediction], examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.tensor([int(prediction) for prediction in predictions])
    return made, torch.tensor([int(example.label or 0) for example in examples])


def _accuracy(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    from torchmetrics.functional.classification import multiclass_accuracy

    made, wanted = _classes(predictions, examples)
    return float(multiclass_accuracy(made, wanted, num_classes=len(spec.labels), average="micro"))


def _f1(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    from torchmetrics.functional.classification import binary_f1_score

    return float(binary_f1_score(*_classes(predictions, examples)))


def _macro_f1(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    from torchmetrics.functional.classification import multiclass_f1_score

    made, wanted = _classes(predictions, examples)
    return float(multiclass_f1_score(made, wanted, num_classes=len(spec.labels), average="macro"))


def _matthews(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    made, wanted = _classes(predictions, examples)
    # a correlation with a constant is undefined; torchmetrics would put a small number in the denominator
    if len(set(made.tolist())) < 2 or len(set(wanted.tolist())) < 2:
        return 0.0
    return float(multiclass_matthews_corrcoef(made, wanted, num_classes=len(spec.labels)))


def _values(
    predictions: Sequence[Prediction], examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.tensor([float(prediction) for prediction in predictions], dtype=torch.float64)
    return made, torch.tensor([float(example.label or 0.0) for example in examples], dtype=torch.float64)


def _correlation(name: str) -> Callable[[TaskSpec, Sequence[Prediction], Sequence[Example]], float]:
    def correlation(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        from torchmetrics.functional import regression

        made, wanted = _values(predictions, examples)
        # undefined for constants; torchmetrics would answer with rounding noise or a warning
        if len(made) < 2 or not bool(made.isfinite().all()) or bool((made == made[0]).all()):
            return 0.0
        return float(getattr(regression, name)(made, wanted))

    return correlation


def _squad(key: str) -> Callable[[TaskSpec, Sequence[Prediction], Sequence[Example]], float]:
    def squad(spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        from torchmetrics.functional.text import squad as score

        made = [{"prediction_text": str(text), "id": str(index)} for index, text in enumerate(predictions)]
        wanted = [
            {"answers": {"answer_start": [0] * len(one.answers), "text": list(one.answers)}, "id": str(index)}
            for index, one in enumerate(examples)
        ]
        return float(score(made, wanted)[key]) / 100.0

    return squad


def _group_exact_match(
    spec: TaskSpec, predictions: Sequence[Prediction], examples: Sequence[Example]
) -> float:
    right: dict[str | None, bool] = defaultdict(lambda: True)
    for prediction, example in zip(predictions, examples, strict=True):
        right[example.group] = right[example.group] and prediction == example.label
    return sum(right.values()) / len(right)


_METRICS: dict[str, Callable[[TaskSpec, Sequence[Prediction], Sequence[Example]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _correlation("pearson_corrcoef"),
    "spearman": _correlation("spearman_corrcoef"),
    "text_f1": _squad("f1"),
    "exact_match": _squad("exact_match"),
    "group_exact_match": _group_exact_match,
}

NAMES = tuple(_METRICS)
"""Names that a task may use."""
