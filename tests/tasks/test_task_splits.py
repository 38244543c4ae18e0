"""The split protocol, limits, and the generated task."""

from __future__ import annotations

import pytest

from dsso import tasks
from dsso.config import TaskConfig
from dsso.errors import RecipeError
from dsso.tasks import builtin
from dsso.tasks.base import Example
from dsso.tasks.loading import split


def examples(count, name):
    return [Example({"text": f"{name} {index}"}, index % 2) for index in range(count)]


def texts(split_examples):
    return {example.texts["text"] for example in split_examples}


def test_below_10k_the_validation_set_is_halved():
    public = {"train": examples(9_999, "t"), "validation": examples(101, "v")}
    train, validation, test = split(public, "paper", seed=3)
    assert train == public["train"] and (len(validation), len(test)) == (50, 51)
    assert texts(validation) | texts(test) == texts(public["validation"])
    assert not texts(validation) & texts(test)


def test_from_10k_on_1000_training_examples_become_validation():
    public = {"train": examples(10_000, "t"), "validation": examples(101, "v")}
    train, validation, test = split(public, "paper", seed=3)
    assert (len(train), len(validation)) == (9_000, 1_000) and test == public["validation"]
    assert texts(train) | texts(validation) == texts(public["train"])


def test_the_halves_depend_on_the_seed_alone():
    public = {"train": examples(10, "t"), "validation": examples(50, "v")}
    assert split(public, "paper", 1) == split(public, "paper", 1)
    assert split(public, "paper", 1) != split(public, "paper", 2)


def test_the_official_protocol_takes_a_labelled_test_set_if_there_is_one():
    public = {"train": examples(10, "t"), "validation": examples(5, "v")}
    assert split(public, "official", 0)[2] == public["validation"]
    assert split({**public, "test": examples(7, "x")}, "official", 0)[2] == examples(7, "x")


def test_one_validation_example_cannot_be_halved():
    with pytest.raises(RecipeError, match="cannot be halved"):
        split({"train": examples(10, "t"), "validation": examples(1, "v")}, "paper", 0)


def test_limits_take_a_random_subset():
    task = tasks.load_task(TaskConfig(train_examples=50, eval_examples=20), 0)
    whole = tasks.load_task(TaskConfig(), 0)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 20, 20)
    assert list(task.train) != list(whole.train)[:50]
    assert {e.texts["sentence2"] for e in task.train} <= {e.texts["sentence2"] for e in whole.train}


def test_builtin_is_a_function_of_the_seed():
    assert builtin.generate(0, 20, 5) == builtin.generate(0, 20, 5)
    assert builtin.generate(0, 20, 5) != builtin.generate(1, 20, 5)
    assert builtin.generate(0, 20, 5)["train"] == builtin.generate(0, 40, 9)["train"][:20]


def test_builtin_has_few_duplicates_and_no_leak_into_the_validation_set():
    public = builtin.generate(0)
    pairs = {name: [tuple(e.texts.values()) for e in public[name]] for name in public}
    assert len(pairs["train"]) == 3_000
    assert len(set(pairs["train"])) > 0.98 * len(pairs["train"])
    assert not set(pairs["train"]) & set(pairs["validation"])


def test_the_hints_of_builtin_tell_something_but_far_from_everything():
    validation = builtin.generate(0)["validation"]

    def accuracy(looks_same):
        right = [int(looks_same(example.texts["sentence2"])) == example.label for example in validation]
        return sum(right) / len(right)

    def not_denied(text):
        return not (" never " in text or " not " in text) or "not fail" in text

    majority = accuracy(lambda text: True)
    assert 0.5 < majority < 0.62
    assert majority + 0.05 < accuracy(lambda text: not text.endswith("!")) < 0.8
    assert majority + 0.1 < accuracy(not_denied) < 0.85
