"""What is lowered instead of the loss: sums against direct computation, splits, and what is refused."""

from __future__ import annotations

import copy
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsso.config import OBJECTIVES, TaskConfig, TrainConfig
from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.errors import RecipeError, RunError
from dsso.optim.mezo import Config
from dsso.tasks import objectives
from dsso.tasks.evaluate import records, written
from dsso.tasks.loading import without_data
from dsso.tasks.metrics import compute

FORMS = [
    ("tiny-t5", "prompt", ["no", "yes"]),
    ("tiny-t5", "prompt", ["a", "b"]),
    ("tiny-roberta", "prompt", ["no", "yes"]),
    ("tiny-opt", "prompt", ["no", "yes"]),
    ("tiny-llama", "prompt", ["a", "b"]),
    ("tiny-bert", "classification", None),
    ("tiny-llama", "classification", None),
]
SPLITS = ([list(range(12))], [[0], [1, 2, 3, 4], list(range(5, 12))], [[n] for n in range(12)])


def spread(made, scale=0.05):
    """Weights far enough from the start that the answers differ between examples."""
    with torch.no_grad():
        for parameter in made.bundle.model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    made.bundle.model.eval()
    return made


def engine_of(made):
    """As much of an engine as an objective asks for."""

    class Engine:
        module, device = made.bundle.model, torch.device("cpu")

        def __call__(self, **inputs):
            return self.module(**inputs)

    return Engine()


def sums(made, name, split):
    """Totals over the parts of a split, [m]."""
    objective = objectives.choose(name, made.task.spec)
    with torch.no_grad():
        return sum(objective.sums(made.ready, engine_of(made), part) for part in split)


def value(made, name, split):
    objective = objectives.choose(name, made.task.spec)
    totals = sums(made, name, split).unsqueeze(0)
    return float(objective.value(totals) if objective.value else totals[0, 0] / totals[0, 1])


@torch.no_grad()
def answers(made, count):
    """Classes chosen one example and one candidate at a time, from the definition."""
    model, ready, chosen = made.bundle.model, made.ready, []
    for index in range(count):
        if made.bundle.head != "prompt":
            logits = model(**ready.collate([ready.train[index]], [index]).inputs).logits[0]
            chosen.append(int(logits.argmax()))
            continue
        totals = []
        for label in (0, 1):
            batch = ready.collate([ready.coder.candidate(ready.train[index], label)], [index])
            logits = model(**batch.inputs).logits[0].log_softmax(-1)
            target = [(c, t) for c, t in enumerate(batch.labels[0].tolist()) if t >= 0]
            totals.append(sum(logits[column, token].item() for column, token in target))
        chosen.append(int(totals[1] > totals[0]))
    return chosen


@pytest.mark.parametrize(("name", "head", "words"), FORMS)
def test_classes_are_counted(make, name, head, words):
    made = spread(make(name, head=head, **({"verbalizer": words} if words else {})))
    made_by_hand, wanted = answers(made, 12), [example.label for example in made.task.train[:12]]
    pairs = list(zip(made_by_hand, wanted, strict=True))
    right = sum(a == b for a, b in pairs)
    counts = [pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1))]
    for split in SPLITS:
        assert sums(made, "accuracy", split).tolist() == [right, 12]
        assert sums(made, "f1", split).tolist() == counts
    # the values are those of the metrics that the task is judged by
    metrics = compute(made.task.spec, made_by_hand, made.task.train[:12])
    assert value(made, "accuracy", SPLITS[1]) == pytest.approx(1 - metrics["accuracy"], abs=1e-6)
    assert value(made, "f1", SPLITS[1]) == pytest.approx(1 - metrics["f1"], abs=1e-6)


def test_f1_of_the_whole_is_no_mean_of_parts(make):
    made = spread(make("tiny-bert"), 0.2)
    whole = value(made, "f1", SPLITS[0])
    parts = [value(made, "f1", [part]) for part in SPLITS[1]]
    assert 0 < whole < 1
    assert abs(whole - sum(parts) / len(parts)) > 0.02


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-bert"])
def test_the_loss(make, name):
    made = spread(make(name))
    found = records(made.ready, made.bundle.model, "train", 5, 0, 1, "cpu")[:12]
    expected = [sum(one.loss for one in found), sum(one.terms for one in found)]
    for split in SPLITS:
        assert sums(made, "loss", split).tolist() == pytest.approx(expected, rel=1e-5)
    assert objectives.choose("loss", made.task.spec).value is None


def rows(count):
    return [
        {"context": f"text {n} " * (n + 1), "question": "q", "answers": {"text": ["x"], "answer_start": [0]}}
        for n in range(count)
    ]


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-opt", "tiny-llama"])
def test_texts_are_compared(make, write, name):
    folder = str(write("squad", train=rows(12), validation=rows(6)))
    made = spread(make(name, name="squad", data_dir=folder, max_target_length=6))
    if name == "tiny-t5":
        # a random model with a tied head repeats its start token, which is no text
        head = made.bundle.model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    texts = [one.prediction for one in records(made.ready, made.bundle.model, "train", 5, 0, 1, "cpu")]
    assert any(texts), "something was written"
    for index, example in enumerate(made.task.train):
        own = (f"{texts[index]}", "zzz") if index in (1, 4, 6) else ("zzz",)
        made.task.train[index] = replace(example, answers=own)
    split = [[0], [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]
    for parts in (split, [list(range(12))]):
        assert sums(made, "exact_match", parts).tolist() == [3, 12]
        assert sums(made, "text_f1", parts).tolist() == pytest.approx([3, 12], abs=1e-4)
    assert value(made, "exact_match", split) == 0.75


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-opt"])
def test_texts_are_written_by_the_perturbed_weights(make, write, name):
    """Generation reaches parts of a model past its own forward pass."""
    folder = str(write("squad", train=rows(4), validation=rows(4)))
    made = make(name, name="squad", data_dir=folder, max_target_length=6)
    if name == "tiny-t5":
        head = made.bundle.model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    twin = copy.deepcopy(made.bundle.model)

    def perturb(name, start, base, out):
        out.copy_(base + 0.1 * torch.arange(start, start + base.numel()).mul(7.1).cos())

    for name_, parameter in twin.named_parameters():
        perturb(name_, 0, parameter.data.view(-1).clone(), parameter.data.view(-1))
    model, encoded = made.bundle.model, made.ready.train[:4]
    engine = ForwardEngine(model, make_forward_optimizer(model, "MeZO", Config()), torch.device("cpu"), 1, 4)
    engine.eval()
    before = written(made.ready, engine, encoded, 1, "cpu")
    with engine._weights.showing(perturb):
        texts = written(made.ready, engine, encoded, 1, "cpu")
    assert texts == written(made.ready, twin.eval(), encoded, 1, "cpu") != before
    assert written(made.ready, engine, encoded, 1, "cpu") == before


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_scores_that_are_no_numbers_give_no_sums(make, name):
    made = make("tiny-bert")
    assert sums(made, name, [[0, 1]]).isfinite().all()
    with torch.no_grad():
        made.bundle.model.classifier.bias[0] = float("nan")
    assert sums(made, name, [[0, 1]]).isnan().all()
    assert math.isnan(value(made, name, [[0, 1]]))


def test_texts_from_scores_that_are_no_numbers_give_no_sums(make, write):
    folder = str(write("squad", train=rows(4), validation=rows(4)))
    made = make("tiny-opt", name="squad", data_dir=folder, max_target_length=4)
    assert sums(made, "exact_match", [[0, 1]]).isfinite().all()
    with torch.no_grad():
        made.bundle.model.model.decoder.final_layer_norm.bias[0] = float("nan")
    assert sums(made, "exact_match", [[0, 1]]).isnan().all()


def test_f1_where_it_is_undefined(make):
    f1 = objectives.choose("f1", make("tiny-bert").task.spec).value
    assert f1(torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])).tolist() == pytest.approx([1.0, 1 / 7])


def test_names_of_objectives():
    assert [TrainConfig(max_steps=1, objective=name).objective for name in (*OBJECTIVES, "a.b:c")]
    for wrong in ("acuracy", "a:", ":b", "a:b:c", "a b:c", "1a:b"):
        with pytest.raises(ValueError, match="unknown objective"):
            TrainConfig(max_steps=1, objective=wrong)


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        (
            "stsb",
            "accuracy",
            ["'stsb' cannot be judged so", "its answers are numbers", "allowed: loss, module"],
        ),
        ("stsb", "f1", ["its answers are numbers"]),
        ("trec", "f1", ["F1 is that of two classes, and it has 6", "remedy: set it to 'accuracy'"]),
        ("mrpc", "exact_match", ["compares texts that the model has written", "its answers are classes"]),
        ("squad", "accuracy", ["its answers are free text", "allowed: loss, exact_match, text_f1"]),
    ],
)
def test_what_does_not_suit_a_task(make, task, name, words):
    spec = without_data(TaskConfig(name=task), 0, "its labels are enough").spec
    with pytest.raises(RecipeError) as caught:
        objectives.choose(name, spec)
    for word in ["dsso.train.objective", *words]:
        assert word in str(caught.value)


# -- functions of the user's own -----------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch):
    """A module of the user's."""
    found = types.ModuleType("my_objectives")
    monkeypatch.setitem(sys.modules, "my_objectives", found)
    return found


def test_a_function_of_two_sums(make, write, module):
    data = [{"sentence1": "a" * i, "sentence2": "b", "label": i / 4} for i in range(1, 17)]
    made = spread(make("tiny-roberta", name="stsb", data_dir=str(write("stsb", train=data, validation=data))))

    def absolute(outputs, batch):
        off = (outputs.logits.squeeze(-1) - batch.labels).abs()
        return torch.stack([off.sum(), torch.tensor(float(len(off)))])

    module.absolute = absolute
    with torch.no_grad():
        encoded = made.ready.collate(made.ready.train[:12], range(12))
        expected = (made.bundle.model(**encoded.inputs).logits.squeeze(-1) - encoded.labels).abs().mean()
    for split in SPLITS:
        assert value(made, "my_objectives:absolute", split) == pytest.approx(float(expected), rel=1e-5)


def test_a_function_with_a_value_of_its_own(make, module):
    made = spread(make("tiny-bert"), 0.2)

    def right(outputs, batch):
        made = outputs.logits.argmax(-1)
        return torch.stack(
            [((made == batch.labels) & (made == label)).sum() for label in (0, 1)]
            + [(batch.labels == label).sum() for label in (0, 1)]
        )

    right.value = lambda totals: 1 - (totals[0] / totals[2] + totals[1] / totals[3]) / 2
    module.right = right
    chosen, wanted = answers(made, 12), [example.label for example in made.task.train[:12]]
    shares = [
        sum(a == b == label for a, b in zip(chosen, wanted, strict=True)) / wanted.count(label)
        for label in (0, 1)
    ]
    for split in SPLITS:
        assert value(made, "my_objectives:right", split) == pytest.approx(1 - sum(shares) / 2)
    own = objectives.choose("my_objectives:right", made.task.spec).value
    assert own(torch.tensor([[1.0, 1.0, 1.0, 1.0], [float("inf"), 1.0, 1.0, 1.0]])).tolist() == [
        0.0,
        pytest.approx(float("nan"), nan_ok=True),
    ]


def test_the_functions_of_the_manual(make, module):
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    section = text.split("## Objectives")[1].split("## Fields")[0]
    blocks = [part.split("```")[0] for part in section.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, vars(module))
    made = spread(make("tiny-bert"), 0.2)
    with torch.no_grad():
        batch = made.batch(12)
        logits = made.bundle.model(**batch.inputs).logits
    right = [float(row[label] - row[1 - label]) for row, label in zip(logits, batch.labels, strict=True)]
    hinge = sum(max(0.0, 1 - margin) for margin in right) / 12
    found = [margin > 0 for margin, label in zip(right, batch.labels, strict=True) if label == 1]
    for split in SPLITS:
        assert value(made, "my_objectives:hinge", split) == pytest.approx(hinge, rel=1e-4)
        assert value(made, "my_objectives:recall", split) == pytest.approx(1 - sum(found) / len(found))


@pytest.mark.parametrize(
    ("returned", "with_value", "words"),
    [
        (0.5, False, ["must return sums over the micro-batch as one vector", "got: 'float'"]),
        (torch.tensor(0.5), False, ["as one vector", "shape ()", "torch.stack([sum, count])"]),
        (torch.ones(2, 2), True, ["as one vector", "shape (2, 2)"]),
        (torch.ones(0), True, ["as one vector", "shape (0,)"]),
        (torch.ones(3), False, ["must return two numbers, whose ratio is lowered", "got: 3", "'value'"]),
    ],
)
def test_sums_that_cannot_be_used(make, module, returned, with_value, words):
    made = make("tiny-bert")

    def function(outputs, batch):
        return returned

    if with_value:
        function.value = lambda totals: totals[0]
    module.function = function
    with pytest.raises(RunError) as caught:
        sums(made, "my_objectives:function", [[0, 1]])
    for word in ["dsso.train.objective", "my_objectives:function", *words]:
        assert word in str(caught.value)


def test_sums_of_changing_length(make, module):
    made = make("tiny-bert")

    def function(outputs, batch):
        return torch.ones(len(batch.labels))

    function.value = lambda totals: totals.sum()
    module.function = function
    assert sums(made, "my_objectives:function", [[0, 1], [2, 3]]).tolist() == [2, 2]
    with pytest.raises(RunError, match="another number of sums than before"):
        sums(made, "my_objectives:function", [[0, 1], [2]])


def test_values_that_are_no_numbers(make, module):
    def function(outputs, batch):
        return torch.ones(3)

    module.function = function
    for returned in (torch.ones(2), "low", None):
        function.value = lambda totals, returned=returned: returned
        own = objectives.choose("my_objectives:function", make("tiny-bert").task.spec)
        with pytest.raises(RunError, match=r"my_objectives:function\.value must return one number"):
            own.value(torch.ones(2, 3))


def test_modules_and_functions_that_are_not_there(make, module, tmp_path, monkeypatch):
    spec = make("tiny-bert").task.spec
    module.margin, module.one, module.number = (lambda outputs, batch: None), (lambda outputs: None), 3
    module.bad = types.SimpleNamespace()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "dsso_wrong.py").write_text("def f(:\n")
    (tmp_path / "dsso_needs.py").write_text("import no_such_thing\n")
    (tmp_path / "dsso_fine.py").write_text("class F:\n def __call__(self, outputs, batch): ...\nf = F()\n")
    for name, words in {
        "no_such_module:f": ["there is no module 'no_such_module'", "PYTHONPATH", str(tmp_path)],
        "my_objectives.sub:f": ["there is no module 'my_objectives.sub'"],
        "my_objectives:margn": ["has no such function", "nearest: 'margin'"],
        "my_objectives:one": ["cannot be called as function(outputs, batch)"],
        "my_objectives:number": ["cannot be called as function(outputs, batch)"],
        "dsso_wrong:f": ["the module cannot be imported (SyntaxError"],
        "dsso_needs:f": [
            "the module cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"
        ],
    }.items():
        with pytest.raises(RecipeError) as caught:
            objectives.choose(name, spec)
        for word in ["dsso.train.objective", "remedy: ", *words]:
            assert word in str(caught.value), name
    module.margin.value = 3
    with pytest.raises(RecipeError, match="its attribute 'value' cannot be called"):
        objectives.choose("my_objectives:margin", spec)
    assert objectives.choose("dsso_fine:f", spec).value is None
