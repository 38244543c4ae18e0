"""Rows from a directory of jsonl files or from the Hugging Face hub, checked as they are read.

Every complaint names the file and the line, so that a damaged file is found without a debugger.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsso.errors import RecipeError
from dsso.tasks import hub
from dsso.tasks.base import Example, Row, TaskSpec

SPLITS = ("train", "validation", "test")
ENVIRONMENT = "DSSO_DATA"
"""Environment variable with the directory that is searched when `dsso.task.data_dir` is not set."""


@dataclass(frozen=True)
class Table:
    """Rows of one split, with the place of each."""

    rows: Sequence[Row]
    where: str
    lines: Sequence[int] | None = None
    """Line numbers from 1 where the rows come from a file."""

    def place(self, index: int) -> str:
        """Where row `index` is, for a message."""
        if self.lines is None:
            return f"{self.where} row {index}"
        return f"{self.where} line {self.lines[index]}"


def read_jsonl(path: Path) -> Table:
    """Read a file with one JSON object per line; blank lines are passed over.

    Raises:
        RecipeError: a line cannot be parsed or is no object (with its number), or the file has no rows.
    """
    rows: list[Row] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                rows.append(_parse_line(line, path, number))
                lines.append(number)
    except OSError as error:
        raise RecipeError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        remedy = "write the file as UTF-8"
        raise RecipeError("the file is not UTF-8 text", where=str(path), remedy=remedy) from error
    if not rows:
        raise RecipeError(
            "the data file is empty",
            where=str(path),
            remedy="write one JSON object per line, or remove the file",
        )
    return Table(rows, str(path), lines)


def _parse_line(line: str, path: Path, number: int) -> Row:
    where = f"{path} line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        cut = not line.endswith("\n") or not line.rstrip().endswith("}")
        what = "the line is cut short" if cut else "the line is no valid JSON"
        raise RecipeError(
            # some of json's messages end with "at" themselves
            f"{what} ({error.msg.removesuffix(' at')} at column {error.colno})",
            where=where,
            got=line.strip()[-60:],
            allowed="one complete JSON object per line",
            remedy="copy the file again, or remove the line",
        ) from error
    if not isinstance(row, dict):
        raise RecipeError(
            "the line is no JSON object",
            where=where,
            got=line.strip()[:60],
            allowed="one JSON object per line",
        )
    return row


class DataMissing(RecipeError):
    """The data of a task is not where it was looked for: a plan can do without it, a run cannot."""


@dataclass(frozen=True)
class Source:
    """A place that holds the splits of a task."""

    where: str
    available: tuple[str, ...]
    """Names of the splits that exist."""
    read: Callable[[str], Table]
    """Reads a split by the name that it has there."""

    def resolve(self, split: str, spec: TaskSpec) -> str | None:
        """Name that `split` has there, or None when it does not exist.

        A directory may call a split by its general name or by the task's own name for it.
        """
        for name in (split, spec.splits.get(split)):
            if name is not None and name in self.available:
                return name
        return None


def open_source(spec: TaskSpec, data_dir: str | None) -> Source:
    """Find the data of a task: `data_dir`, then `$DSSO_DATA`, then the hub.

    Args:
        spec: the task.
        data_dir: directory with `<task>/train.jsonl` … or with `train.jsonl` … itself.

    Raises:
        RecipeError: `data_dir` does not exist or holds nothing for the task.
    """
    if data_dir is not None:
        return _directory(spec, Path(data_dir).expanduser(), "dsso.task.data_dir")
    variable = os.environ.get(ENVIRONMENT)
    if variable:
        root = Path(variable).expanduser()
        if not root.is_dir():
            raise RecipeError(
                "is no directory", where=f"${ENVIRONMENT}", got=variable, remedy="correct or unset it"
            )
        # the variable is a general place: a task that it does not hold comes from the hub
        if (root / spec.name).is_dir():
            return _directory(spec, root, f"${ENVIRONMENT}")
    return _hub(spec)


def _directory(spec: TaskSpec, root: Path, where: str) -> Source:
    if not root.is_dir():
        remedy = "give the directory that holds the jsonl files"
        raise DataMissing("the data directory does not exist", where=where, got=str(root), remedy=remedy)
    nested = root / spec.name
    folder = nested if nested.is_dir() else root
    available = tuple(sorted(path.stem for path in folder.glob("*.jsonl")))
    if not available:
        held = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataMissing(
            f"the data directory holds nothing for the task {spec.name!r}",
            where=where,
            got=str(root),
            allowed=f"{spec.name}/train.jsonl and {spec.name}/validation.jsonl, or both files in that "
            f"directory itself; present: {', '.join(held) or 'nothing'}",
            remedy="correct dsso.task.name or the directory",
        )
    return Source(str(folder), available, lambda name: read_jsonl(folder / f"{name}.jsonl"))


def _hub(spec: TaskSpec) -> Source:
    where = f"{spec.hub}/{spec.config}" if spec.config else spec.hub

    def read(name: str) -> Table:
        return Table(_load_from_hub(spec, name), f"{where} split {name}")

    # a hub repository is asked for the splits by the task's own names
    available = tuple(spec.splits.get(split, split) for split in SPLITS)
    return Source(f"hub {where}", tuple(dict.fromkeys(available)), read)


def _load_from_hub(spec: TaskSpec, split: str) -> Sequence[Row]:
    hub.prefer_cache()
    import datasets

    try:
        try:
            loaded: Any = datasets.load_dataset(spec.hub, spec.config, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # repositories that still carry a loading script have an automatic conversion beside it
            loaded = datasets.load_dataset(
                spec.hub, spec.config, split=split, revision="refs/convert/parquet"
            )
    except Exception as error:
        raise DataMissing(
            f"the split {split!r} could not be loaded from the hub ({type(error).__name__}: {error})"
            f"{hub.words()}",
            where=f"task {spec.name}, {spec.hub}",
            remedy=f"check the network, or set dsso.task.data_dir (or ${ENVIRONMENT}) to a directory with "
            f"{spec.name}/train.jsonl and {spec.name}/validation.jsonl",
        ) from error
    if len(loaded) == 0:
        raise RecipeError("the split is empty", where=f"task {spec.name}, {spec.hub} split {split}")
    return loaded  # type: ignore[no-any-return]


def to_examples(spec: TaskSpec, table: Table, columns: Mapping[str, str] | None) -> list[Example]:
    """Check the rows of a split and turn them into examples.

    Args:
        spec: the task.
        table: the rows.
        columns: name in the file by the name that the task expects, where they differ.

    Raises:
        RecipeError: a row lacks a column or has a label that does not exist, with its line.
    """
    renamed = dict(columns or {})
    unknown = [name for name in renamed if name not in spec.required_columns()]
    if unknown:
        raise RecipeError(
            f"the task {spec.name!r} has no such column",
            where="dsso.task.columns",
            got=unknown[0],
            allowed=spec.required_columns(),
            remedy='write {"name that the task expects": "name in the file"}',
        )
    examples = []
    for index, raw in enumerate(table.rows):
        row = _renamed(spec, raw, renamed, table, index)
        example = _example(spec, row, table, index)
        if example is not None:
            examples.append(example)
    if not examples:
        raise RecipeError("no row has a label", where=table.where, remedy="use a labelled split")
    return examples


def _renamed(spec: TaskSpec, raw: Row, renamed: Mapping[str, str], table: Table, index: int) -> Row:
    row = dict(raw)
    for name in spec.required_columns():
        actual = renamed.get(name, name)
        if actual not in raw:
            raise RecipeError(
                f"the column {actual!r} does not exist",
                where=table.place(index),
                got=", ".join(raw),
                remedy=f'name it in dsso.task.columns, as in {{"{name}": "<column of the file>"}}',
            )
        row[name] = raw[actual]
        # a null label is refused as a label that does not exist
        if name != spec.label_column and _holds_null(raw[actual]):
            raise RecipeError(
                f"the column {actual!r} is null",
                where=table.place(index),
                got=str(dict(raw))[:80],
                allowed="a text, which may be empty",
                remedy="write the text, or remove the row",
            )
    return row


def _holds_null(value: object) -> bool:
    return value is None or (isinstance(value, list) and None in value)


def _example(spec: TaskSpec, row: Row, table: Table, index: int) -> Example | None:
    try:
        group = spec.group(row) if spec.group is not None else None
        texts = spec.texts(row)
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f"a column has not the form of the hub's rows ({type(error).__name__}: {error})",
            where=table.place(index),
            got=str(dict(row))[:80],
        ) from error
    if spec.kind == "text":
        return Example(texts, answers=_answers(spec, row, table, index), group=group)
    label = row[spec.label_column]
    if isinstance(label, bool):
        label = int(label)
    if label in spec.unlabelled and not isinstance(label, str):
        return None
    if spec.kind == "regression":
        number = isinstance(label, (int, float)) and math.isfinite(label)
        if not number or not spec.value_range[0] <= label <= spec.value_range[1]:
            low, high = spec.value_range
            raise RecipeError(
                "the label is out of range",
                where=table.place(index),
                got=label,
                allowed=f"a number from {low} to {high}",
            )
        return Example(texts, float(label), group=group)
    if isinstance(label, str) and label in spec.labels:
        label = spec.labels.index(label)
    if not isinstance(label, int) or not 0 <= label < len(spec.labels):
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(spec.labels))
        raise RecipeError(
            "the label does not exist",
            where=table.place(index),
            got=label,
            allowed=known,
            remedy="a label of -1 marks an unlabelled test set, which cannot be used"
            if label == -1
            else None,
        )
    return Example(texts, label, group=group)


def _answers(spec: TaskSpec, row: Row, table: Table, index: int) -> tuple[str, ...]:
    assert spec.answers is not None
    try:
        answers = spec.answers(row)
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f"the column {spec.label_column!r} has not the form of the hub's rows ({error})",
            where=table.place(index),
            got=str(row[spec.label_column])[:80],
        ) from error
    answers = tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise RecipeError(
            "the row has no answer", where=table.place(index), got=str(row[spec.label_column])[:80]
        )
    return answers
