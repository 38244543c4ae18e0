"""Data that is damaged, missing or named wrongly: the message says where, and what to do."""

from __future__ import annotations

import json

import datasets
import pytest

from dsso import tasks
from dsso.config import TaskConfig
from dsso.errors import RecipeError


def rte(count, label=0):
    return [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": label, "idx": i} for i in range(count)]


def message(*, name="rte", **config):
    with pytest.raises(RecipeError) as caught:
        tasks.load_task(TaskConfig(name=name, **config), seed=0)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_a_task_that_does_not_exist():
    text = message(name="mprc")
    assert "dsso.task.name" in text and "nearest: 'mrpc'" in text and "squad" in text


def test_a_directory_that_does_not_exist(tmp_path):
    text = message(data_dir=str(tmp_path / "gone"))
    assert "dsso.task.data_dir" in text and "gone" in text and "does not exist" in text


def test_a_directory_without_the_task(write, tmp_path):
    write("mrpc", train=rte(2))
    text = message(data_dir=str(tmp_path))
    assert "nothing for the task 'rte'" in text and "present: mrpc" in text


def test_an_environment_variable_that_names_no_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("DSSO_DATA", str(tmp_path / "gone"))
    assert "$DSSO_DATA" in message()


def test_a_split_that_does_not_exist(write, tmp_path):
    write("rte", validation=rte(4))
    text = message(data_dir=str(tmp_path))
    assert "split 'train' of the task 'rte' does not exist" in text and "present: validation" in text
    assert "train.jsonl" in text and str(tmp_path / "rte") in text


def test_a_column_that_does_not_exist(write, tmp_path):
    rows = rte(3)
    rows[2]["premise"] = rows[2].pop("sentence1")
    write("rte", train=rows, validation=rte(4))
    text = message(data_dir=str(tmp_path))
    assert "train.jsonl line 3" in text and "column 'sentence1' does not exist" in text
    assert "dsso.task.columns" in text and "premise" in text


def test_a_renamed_column_that_the_task_does_not_know(write, tmp_path):
    write("rte", train=rte(3), validation=rte(4))
    text = message(data_dir=str(tmp_path), columns={"sentense1": "sentence1"})
    assert "dsso.task.columns" in text and "nearest: 'sentence1'" in text


def test_columns_may_be_renamed(write, tmp_path):
    rows = [{"premise": "p", "sentence2": "h", "gold": 1}] * 4
    write("rte", train=rows, validation=rows)
    columns = {"sentence1": "premise", "label": "gold"}
    task = tasks.load_task(TaskConfig(name="rte", data_dir=str(tmp_path), columns=columns), 0)
    assert task.train[0].texts == {"sentence1": "p", "sentence2": "h"} and task.train[0].label == 1


@pytest.mark.parametrize("label", [2, -1, 0.5, "maybe", None])
def test_a_label_that_does_not_exist(write, tmp_path, label):
    write("rte", train=rte(5) + rte(1, label), validation=rte(4))
    text = message(data_dir=str(tmp_path))
    assert "train.jsonl line 6" in text and "the label does not exist" in text
    assert f"got: {label!r}" in text or label is None
    assert "0 (entailment), 1 (not_entailment)" in text


def test_a_label_may_be_its_name(write, tmp_path):
    write("rte", train=rte(3, "not_entailment"), validation=rte(4))
    task = tasks.load_task(TaskConfig(name="rte", data_dir=str(tmp_path)), 0)
    assert [example.label for example in task.train] == [1, 1, 1]


@pytest.mark.parametrize("label", [5.5, -1, "high", float("nan")])
def test_a_value_out_of_range(write, tmp_path, label):
    write("stsb", train=rte(2, 2.5) + rte(1, label), validation=rte(4, 1.0))
    text = message(name="stsb", data_dir=str(tmp_path))
    assert "train.jsonl line 3" in text and "0.0 to 5.0" in text


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file(write, tmp_path, content):
    write("rte", train=rte(3), validation=content)
    text = message(data_dir=str(tmp_path))
    assert "validation.jsonl" in text and "the data file is empty" in text


def test_a_truncated_line(write, tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rte(4))
    write("rte", train=whole + '{"sentence1": "a", "sente', validation=rte(4))
    text = message(data_dir=str(tmp_path))
    assert "train.jsonl line 5" in text and "cut short" in text and "remove the line" in text
    assert "Unterminated string starting at column 20" in text


def test_a_broken_line_in_the_middle_counts_blank_ones(write, tmp_path):
    write("rte", train=json.dumps(rte(1)[0]) + "\n\n{not json}\n", validation=rte(4))
    text = message(data_dir=str(tmp_path))
    assert "train.jsonl line 3" in text and "no valid JSON" in text


def test_a_line_that_is_no_object(write, tmp_path):
    write("rte", train='["a", "b"]\n', validation=rte(4))
    assert "line 1: the line is no JSON object" in message(data_dir=str(tmp_path))


def test_a_file_that_is_not_utf8(write, tmp_path):
    folder = write("rte", validation=rte(4))
    (folder / "train.jsonl").write_bytes(b'{"sentence1": "\xff\xfe"}\n')
    assert "not UTF-8" in message(data_dir=str(tmp_path))


def test_answers_of_another_form(write, tmp_path):
    row = {"context": "c", "question": "q", "answers": "plain text"}
    write("squad", train=[row], validation=[row])
    text = message(name="squad", data_dir=str(tmp_path))
    assert "train.jsonl line 1" in text and "'answers'" in text


@pytest.mark.parametrize("rename", [False, True])
def test_a_text_that_is_null(write, tmp_path, rename):
    rows = rte(3)
    rows[1]["sentence1"] = None
    columns = None
    if rename:
        for row in rows:
            row["premise"] = row.pop("sentence1")
        columns = {"sentence1": "premise"}
    write("rte", train=rows, validation=rows)
    text = message(data_dir=str(tmp_path), columns=columns)
    column = "premise" if rename else "sentence1"
    assert f"train.jsonl line 2: the column {column!r} is null" in text and "remove the row" in text


def test_columns_that_are_not_read_may_be_null(write, tmp_path):
    rows = [{**row, "idx": None, "note": None} for row in rte(4)]
    write("rte", train=rows, validation=rows)
    task = tasks.load_task(TaskConfig(name="rte", data_dir=str(tmp_path)), 0)
    assert "None" not in str([example.texts for example in task.train])


RECORD = {"passage": "p", "query": "q", "entities": ["e"], "answers": ["e"]}
SQUAD = {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [None]}}
DROP = {"passage": "p", "question": "q", "answers_spans": {"spans": ["a"], "types": [None]}}


@pytest.mark.parametrize(
    ("name", "row", "bad"),
    [
        ("record", RECORD, {"entities": ["e", None]}),
        ("record", RECORD, {"answers": ["e", None]}),
        ("squad", SQUAD, {"answers": {"text": ["a", None]}}),
        ("drop", DROP, {"answers_spans": {"spans": [None]}}),
    ],
)
def test_a_null_within_a_list(write, tmp_path, name, row, bad):
    write(name, train=[row] * 3, validation=[row] * 3)
    assert len(tasks.load_task(TaskConfig(name=name, data_dir=str(tmp_path)), 0).train) == 3
    write(name, train=[row, {**row, **bad}], validation=[row] * 3)
    text = message(name=name, data_dir=str(tmp_path))
    assert "train.jsonl line 2" in text and "null" in text


def test_the_directory_may_be_that_of_the_task_itself(write):
    folder = write("anywhere", train=rte(3), validation=rte(4, 1))
    task = tasks.load_task(TaskConfig(name="rte", data_dir=str(folder)), 0)
    assert len(task.train) == 3 and task.source == str(folder)


def test_a_split_by_the_name_that_the_hub_gives_it(write, tmp_path):
    row = {"premise": "p", "hypothesis": "h", "label": 1}
    write("mnli", train=[row] * 3, validation_matched=[row] * 4)
    assert len(tasks.load_task(TaskConfig(name="mnli", data_dir=str(tmp_path)), 0).test) == 2


def test_unlabelled_rows_of_snli_are_left_out(write, tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, -1, 2)]
    write("snli", train=rows, validation=rows)
    task = tasks.load_task(TaskConfig(name="snli", data_dir=str(tmp_path), protocol="official"), 0)
    assert [example.label for example in task.train] == [0, 2]


def test_the_hub_is_asked_when_no_directory_holds_the_task(monkeypatch, tmp_path):
    asked = []

    def load_dataset(path, name, split, **options):
        asked.append((path, name, split, options))
        if path == "aps/super_glue" and "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported")
        row = {"premise": "p", "hypothesis": "h", "label": 2}
        return datasets.Dataset.from_list([row] * 6)

    monkeypatch.setenv("DSSO_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = tasks.load_task(TaskConfig(name="cb"), 0)
    assert len(task.train) == 6 and len(task.validation) == 3
    assert asked[1] == ("aps/super_glue", "cb", "train", {"revision": "refs/convert/parquet"})
    asked.clear()
    tasks.load_task(TaskConfig(name="mnli"), 0)
    assert [(path, name, split) for path, name, split, _ in asked] == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
    ]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.delenv("DSSO_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = message(name="wic")
    assert "no route to host" in text and "dsso.task.data_dir" in text and "wic/train.jsonl" in text


def test_builtin_reads_no_files(tmp_path):
    assert "dsso.task.data_dir" in message(name="builtin", data_dir=str(tmp_path))
