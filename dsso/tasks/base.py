"""What a task is: a description (`TaskSpec`), its examples (`Example`) and their splits (`Task`).

A specification is data: which columns a row must have, which texts a model sees, which labels exist and how
answers are judged. Reading rows is `source.py`, turning texts into tokens is `encode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["classification", "regression", "text"]
"""`classification`: one of a list of labels; `regression`: a number; `text`: free text."""

Row = Mapping[str, Any]
"""One row of a data file, in the column names of Hugging Face `datasets`."""


def answer_text(value: object) -> str:
    """An accepted answer of a row as text.

    Args:
        value: as the file has it.

    Raises:
        TypeError: it is null, which `str` would make the word "None".
    """
    if value is None:
        raise TypeError("an answer is null")
    return str(value)


@dataclass(frozen=True, slots=True)
class Example:
    """One example, independent of any tokenizer."""

    texts: Mapping[str, str]
    """Texts by name; prompt templates may refer to each."""
    label: int | float | None = None
    """Class index, or value of a regression; None for free text."""
    answers: tuple[str, ...] = ()
    """Accepted answers of free text; the first one is learnt."""
    group: str | None = None
    """Examples of one group count as right together only (a question with several answers)."""


@dataclass(frozen=True)
class TaskSpec:
    """Description of a task."""

    name: str
    """Name in the recipe."""
    kind: Kind
    hub: str
    """Repository on the Hugging Face hub."""
    columns: tuple[str, ...]
    """Text columns that every row must have."""
    fields: tuple[str, ...]
    """Names of the one or two texts that an encoder with a classification head sees."""
    template: str
    """Prompt for models with a language-model head; `{name}` stands for a text. The answer follows it."""
    metrics: tuple[str, ...]
    """Names from `metrics.py`; the first one decides which checkpoint is best."""
    config: str | None = None
    """Configuration of the hub repository."""
    labels: tuple[str, ...] = ()
    """Names of the classes, by index."""
    verbalizer: tuple[str, ...] = ()
    """One word per class, by index."""
    label_column: str = "label"
    """Column of the class, the value or the answers."""
    render: Callable[[Row], dict[str, str]] | None = None
    """Makes the texts from a row; None takes the columns as they are."""
    answers: Callable[[Row], tuple[str, ...]] | None = None
    """Accepted answers of a row (free text only)."""
    group: Callable[[Row], str] | None = None
    """Group of a row."""
    extra_columns: tuple[str, ...] = ()
    """Columns besides the texts and the label that `render`, `answers` or `group` read."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Where the task names a split otherwise: `{"validation": "validation_matched"}`."""
    unlabelled: tuple[int, ...] = ()
    """Labels that mean "not labelled"; such rows are left out of training and validation."""
    value_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest value of a regression."""
    value_step: float = 0.2
    """Values are rounded to this when they are learnt as text."""

    @property
    def main_metric(self) -> str:
        """Name of the metric that decides which checkpoint is best; larger is better."""
        return self.metrics[0]

    def required_columns(self) -> tuple[str, ...]:
        """All columns that a row must have."""
        return (*self.columns, *self.extra_columns, self.label_column)

    def texts(self, row: Row) -> dict[str, str]:
        """Texts of a row by name."""
        if self.render is not None:
            return self.render(row)
        return {name: str(row[name]) for name in self.columns}


@dataclass(frozen=True)
class Task:
    """A task with its examples, split as the protocol asks."""

    spec: TaskSpec
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    seed: int
    source: str
    """Where the examples came from, for the log."""

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head: classes, or 1 for a regression."""
        return 1 if self.spec.kind == "regression" else len(self.spec.labels)

    def split(self, name: str) -> Sequence[Example]:
        """Examples of `train`, `validation` or `test`."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return splits[name]
