"""Every task, from a row as the hub has it to a loss and to metrics; and the real data, where it is."""

from __future__ import annotations

import math

import pytest
import torch

from dsso import tasks
from dsso.config import TaskConfig
from dsso.errors import RecipeError
from dsso.tasks.loading import SPECS

PAIR = {"sentence1": "It rains.", "sentence2": "It is wet.", "idx": 0}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 0}
ROWS = {
    "sst2": {"sentence": "a fine film", "label": 1, "idx": 0},
    "mrpc": {**PAIR, "label": 1},
    "cola": {"sentence": "It rain.", "label": 0, "idx": 0},
    "rte": {**PAIR, "label": 0},
    "qnli": {"question": "Is it wet?", "sentence": "It rains.", "label": 0, "idx": 0},
    "stsb": {**PAIR, "label": 3.8},
    "mnli": {**NLI, "label": 2},
    "wnli": {**PAIR, "label": 1},
    "boolq": {"question": "is it wet", "passage": "It rains.", "label": 1, "idx": 0},
    "cb": {**NLI, "label": 2},
    "copa": {
        "premise": "It rains.",
        "choice1": "It is wet.",
        "choice2": "It is dry.",
        "question": "effect",
        "label": 0,
        "idx": 0,
    },
    "wic": {
        "word": "place",
        "sentence1": "A place to be.",
        "sentence2": "Place it here.",
        "start1": 2,
        "start2": 0,
        "end1": 7,
        "end2": 5,
        "label": 0,
        "idx": 0,
    },
    "wsc": {
        "text": "Mark told Pete that he was late.",
        "span1_index": 0,
        "span2_index": 4,
        "span1_text": "Mark",
        "span2_text": "he",
        "label": 1,
        "idx": 0,
    },
    "multirc": {
        "paragraph": "It rains.",
        "question": "How is it?",
        "answer": "wet",
        "label": 1,
        "idx": {"paragraph": 0, "question": 3, "answer": 1},
    },
    "record": {
        "passage": "Mark met Pete.",
        "query": "@placeholder was late.",
        "entities": ["Mark", "Pete"],
        "answers": ["Pete"],
        "idx": {"passage": 0, "query": 0},
    },
    "sst5": {"text": "a fine film", "label": 4, "label_text": "very positive"},
    "trec": {"text": "Who was it?", "coarse_label": 3, "fine_label": 20},
    "snli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
    "squad": {
        "id": "0",
        "title": "Rain",
        "context": "It rains today.",
        "question": "When?",
        "answers": {"text": ["today", "today"], "answer_start": [9, 9]},
    },
    "drop": {
        "passage": "It rained on 3 days.",
        "question": "On how many days?",
        "answers_spans": {"spans": ["3"], "types": ["number"]},
    },
}
TEXT = {"squad", "drop", "record"}


def test_the_catalogue_is_complete():
    assert set(ROWS) | {"builtin"} == set(SPECS) == set(tasks.available())


@pytest.mark.parametrize("name", ROWS)
def test_every_task_runs_with_prompts_and_with_a_head(make, write, name):
    folder = str(write(name, train=[ROWS[name]] * 4, validation=[ROWS[name]] * 6))
    for model in ("tiny-t5", "tiny-opt", *(() if name in TEXT else ("tiny-bert",))):
        made = make({"name": model, "dropout": 0.0}, name=name, data_dir=folder, max_target_length=8)
        batch = made.batch(2)
        loss = made.ready.loss_sum(made.bundle.model(**batch.inputs), batch)
        assert math.isfinite(loss.item())
        found = made.ready.evaluate(made.bundle.model, "validation", 3)
        assert set(found) == {*SPECS[name].metrics, "loss"} == {*made.ready.metric_names, "loss"}
        assert made.ready.main_metric == SPECS[name].metrics[0]
        prompt = made.bundle.tokenizer.decode(batch.inputs["input_ids"][0])
        assert "{" not in prompt, "every placeholder is filled"


def test_groups_of_multirc(write):
    rows = [
        {**ROWS["multirc"], "idx": {"paragraph": 0, "question": question, "answer": answer}}
        for question in (0, 1)
        for answer in (0, 1)
    ]
    folder = str(write("multirc", train=rows, validation=rows))
    task = tasks.load_task(TaskConfig(name="multirc", data_dir=folder), 0)
    assert [example.group for example in task.train] == ["0/0", "0/0", "0/1", "0/1"]
    rows[2]["idx"] = 7
    folder = str(write("multirc", train=rows, validation=rows))
    with pytest.raises(RecipeError, match=r"train\.jsonl line 3: a column has not the form"):
        tasks.load_task(TaskConfig(name="multirc", data_dir=folder), 0)


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("rte", 2490, 138, 139),
        ("mrpc", 3668, 204, 204),
        ("stsb", 5749, 750, 750),
        ("sst5", 8544, 550, 551),
        ("cb", 250, 28, 28),
        ("copa", 400, 50, 50),
        # more than 10,000 examples: 1,000 of them are held out
        ("sst2", 19_000, 1_000, 872),
    ],
)
def test_real_data_and_the_protocol(data_root, name, train, validation, test):
    task = tasks.load_task(TaskConfig(name=name, data_dir=str(data_root)), 0)
    assert (len(task.train), len(task.validation), len(task.test)) == (train, validation, test)
    assert str(data_root) in task.source


@pytest.mark.parametrize("name", ["boolq", "squad"])
def test_real_data_without_a_training_set(data_root, name):
    with pytest.raises(RecipeError, match=f"split 'train' of the task '{name}' does not exist") as caught:
        tasks.load_task(TaskConfig(name=name, data_dir=str(data_root)), 0)
    assert "present: validation" in str(caught.value)


@pytest.mark.parametrize(("model", "head"), [("tiny-roberta", "classification"), ("tiny-t5", "prompt")])
def test_a_few_steps_on_real_data_lower_the_loss(make, data_root, model, head):
    made = make(
        {"name": model, "dropout": 0.0}, name="rte", data_dir=str(data_root), head=head, max_length=128
    )
    model, batch = made.bundle.model.train(), made.batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = made.ready.loss_sum(model(**batch.inputs), batch) / batch.terms
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
