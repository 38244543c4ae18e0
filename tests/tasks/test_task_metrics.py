"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
import sys

import pytest

from dsso.errors import RecipeError
from dsso.tasks import metrics
from dsso.tasks.base import Example, TaskSpec
from dsso.tasks.loading import SPECS


def spec(*names, labels=("a", "b")):
    return TaskSpec("made", "classification", "", ("text",), ("text",), "{text}", names, labels=labels)


def examples(labels, groups=None):
    groups = groups or [None] * len(labels)
    return [Example({"text": ""}, label, group=group) for label, group in zip(labels, groups, strict=True)]


def test_classes():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    made, wanted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    found = metrics.compute(spec("accuracy", "f1", "matthews", "macro_f1"), made, examples(wanted))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)


def test_more_than_two_classes():
    found = metrics.compute(
        spec("accuracy", "macro_f1", labels=("a", "b", "c")), [0, 1, 2, 2], examples([0, 1, 2, 1])
    )
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations():
    made, wanted = [1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 4.0]
    found = metrics.compute(spec("pearson", "spearman"), made, examples(wanted))
    assert found["spearman"] == pytest.approx(1.0)
    # covariance 14 over the roots of 50 and 5
    assert found["pearson"] == pytest.approx(14 / math.sqrt(50 * 5))


@pytest.mark.parametrize("made", [[2.0, 2.0, 2.0], [1.0, math.nan, 2.0]])
def test_undefined_correlations_are_zero(made):
    found = metrics.compute(spec("pearson", "spearman"), made, examples([1.0, 2.0, 3.0]))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_always_the_same_class():
    found = metrics.compute(spec("matthews", "f1"), [0, 0, 0], examples([0, 1, 1]))
    assert found == {"matthews": 0.0, "f1": 0.0}


def test_texts():
    wanted = [
        Example({}, answers=("October 1973", "1973")),
        Example({}, answers=("the red house",)),
        Example({}, answers=("blue",)),
    ]
    found = metrics.compute(spec("text_f1", "exact_match"), ["in 1973", "The red, house!", "green"], wanted)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["text_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_question_is_right_if_all_its_answers_are():
    found = metrics.compute(
        spec("group_exact_match"), [1, 0, 1, 1], examples([1, 0, 1, 0], ["1", "1", "2", "2"])
    )
    assert found == {"group_exact_match": 0.5}


def test_every_example_needs_a_prediction():
    with pytest.raises(ValueError, match="2 predictions for 3 examples"):
        metrics.compute(spec("accuracy"), [0, 1], examples([0, 1, 1]))


def test_tasks_use_known_metrics():
    assert {name for one in SPECS.values() for name in one.metrics} <= set(metrics.NAMES)


def test_torchmetrics_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(RecipeError, match=r"pip install -c constraints.txt -e '\.\[metrics\]'"):
        metrics.require_torchmetrics()
