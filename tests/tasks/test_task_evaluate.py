"""Losses, predictions and metrics over ranks."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional

from dsso.tasks import evaluate
from dsso.tasks.evaluate import parse_value, records, score

FORMS = [
    ("tiny-t5", "prompt"),
    ("tiny-roberta", "prompt"),
    ("tiny-opt", "prompt"),
    ("tiny-llama", "prompt"),
    ("tiny-bert", "classification"),
    ("tiny-llama", "classification"),
]


def spread(made):
    """Weights far enough from the start that the answers differ between examples."""
    with torch.no_grad():
        for parameter in made.bundle.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.bundle.model.eval()
    return made


@pytest.mark.parametrize(("name", "head"), FORMS)
def test_padding_and_company_change_no_example(make, name, head):
    made = spread(make(name, head=head))
    batch = made.batch(4)
    assert batch.inputs["attention_mask"].min() == 0 and batch.example_ids.tolist() == [0, 1, 2, 3]
    logits, labels = made.ready.logits(made.bundle.model(**batch.inputs), batch)
    assert len(logits) == len(labels) == batch.terms == sum(made.ready.terms(index) for index in range(4))
    alone = [made.ready.collate([made.ready.train[index]], [index]) for index in range(4)]
    separate = [made.ready.logits(made.bundle.model(**one.inputs), one)[0] for one in alone]
    torch.testing.assert_close(logits, torch.cat(separate), rtol=1e-4, atol=1e-4)
    whole = made.ready.loss_sum(made.bundle.model(**batch.inputs), batch)
    parts = sum(made.ready.loss_sum(made.bundle.model(**one.inputs), one) for one in alone)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole, functional.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize(("name", "head"), FORMS)
def test_metrics_do_not_depend_on_ranks_or_batches(make, name, head):
    made = spread(make(name, head=head))
    model, ready = made.bundle.model, made.ready
    one = ready.evaluate(model, "validation", batch_size=4)
    assert set(one) == {"accuracy", "f1", "loss"}
    calls = []

    def engine(**inputs):
        calls.append(1)
        return model(**inputs)

    engine.module = model
    # 11 examples: with 4 ranks the last one has fewer, with 16 some have none
    for world_size, batch_size in ((1, 11), (3, 2), (4, 3), (16, 1)):
        found, passes = [], set()
        for rank in range(world_size):
            calls.clear()
            found += records(ready, engine, "validation", batch_size, rank, world_size, "cpu")
            passes.add(len(calls))
        assert len(passes) == 1, "every rank makes as many passes"
        assert score(ready, "validation", found) == pytest.approx(one, abs=1e-5)


def test_what_the_ranks_found_is_put_together(make, monkeypatch):
    made = spread(make("tiny-bert"))
    model, ready = made.bundle.model, made.ready
    other = records(ready, model, "validation", 2, 1, 2, "cpu")
    module = types.ModuleType("dsso.parallel.collectives")
    module.gather_objects = lambda mine: [mine, other]
    monkeypatch.setitem(__import__("sys").modules, "dsso.parallel.collectives", module)
    both = ready.evaluate(model, "validation", 2, rank=0, world_size=2)
    assert both == pytest.approx(ready.evaluate(model, "validation", 2), abs=1e-5)


def test_records_must_cover_the_split_once(make):
    made = make("tiny-bert")
    found = records(made.ready, made.bundle.model, "validation", 4, 0, 1, "cpu")
    for wrong in (found[1:], [*found, found[0]]):
        with pytest.raises(ValueError, match="do not cover the 11 examples of validation once each"):
            score(made.ready, "validation", wrong)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(make, training):
    made = make("tiny-bert")
    made.bundle.model.train(training)
    first, second = (made.ready.evaluate(made.bundle.model, "test", 4) for _ in range(2))
    assert first == second and made.bundle.model.training is training


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-opt", "tiny-llama", "tiny-roberta"])
def test_the_class_with_the_likeliest_words_is_chosen(make, name):
    """Against log-likelihoods added up token by token from a forward pass of each single example."""
    made = spread(make(name, head="prompt", verbalizer=["no", "yes"]))
    ready, model = made.ready, made.bundle.model
    found = records(ready, model, "validation", 4, 0, 1, "cpu")
    for record in found[:6]:
        totals = []
        for label in (0, 1):
            encoded = ready.coder.candidate(ready.validation[record.index], label)
            batch = ready.collate([encoded], [0])
            logits = model(**batch.inputs).logits[0].log_softmax(-1)
            target = [(c, t) for c, t in enumerate(batch.labels[0].tolist()) if t >= 0]
            assert [token for _, token in target] == ready.coder.class_ids[label]
            totals.append(sum(logits[column, token].item() for column, token in target))
        assert record.prediction == int(totals[1] > totals[0])


def test_words_of_one_token_need_one_pass(make):
    made = spread(make("tiny-t5", verbalizer=["a", "b"]))
    ready, encoded = made.ready, made.ready.validation[:5]
    batch = ready.collate(encoded, range(5))
    logits, _ = ready.logits(made.bundle.model(**batch.inputs), batch)
    # each target is its word and the end of the sequence; no engine is needed for another pass
    fast = evaluate.class_scores(ready, None, encoded, range(5), "cpu", logits)
    slow = []
    for label in (0, 1):
        one = ready.collate([ready.coder.candidate(example, label) for example in encoded], range(5))
        scores, labels = ready.logits(made.bundle.model(**one.inputs), one)
        slow.append(-functional.cross_entropy(scores, labels, reduction="none"))
    torch.testing.assert_close(fast, torch.stack(slow, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peft", ["none", "lora", "prefix"])
@pytest.mark.parametrize("name", ["tiny-t5", "tiny-opt", "tiny-llama"])
def test_written_answers_do_not_depend_on_padding(make, write, name, peft):
    rows = [
        {"context": "long " * n + "x", "question": "q", "answers": {"text": ["abc"], "answer_start": [0]}}
        for n in (1, 7, 20)
    ]
    folder = str(write("squad", train=rows, validation=rows * 2))
    made = spread(make(name, {"type": peft}, name="squad", data_dir=folder, max_target_length=6))
    if name == "tiny-t5":
        # a random model with a tied head repeats its start token, which is no text
        base = made.bundle.model if peft == "none" else made.bundle.model.get_base_model()
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    together = records(made.ready, made.bundle.model, "validation", 3, 0, 1, "cpu")
    alone = records(made.ready, made.bundle.model, "validation", 1, 0, 1, "cpu")
    assert [one.prediction for one in together] == [one.prediction for one in alone]
    assert all(isinstance(one.prediction, str) for one in together)
    assert any(one.prediction for one in together), "something was written"
    assert set(made.ready.evaluate(made.bundle.model, "test", 2)) == {"text_f1", "exact_match", "loss"}


def test_values_are_written_and_read(make, write):
    rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (0.0, 3.27, 5.0)]
    folder = str(write("stsb", train=rows, validation=rows * 2))
    made = make("tiny-t5", name="stsb", data_dir=folder)
    written = {made.bundle.tokenizer.decode(one["labels"][:-1]) for one in made.ready.train}
    assert written == {"0.0", "3.2", "5.0"}
    assert set(made.ready.evaluate(made.bundle.model, "test", 2)) == {"pearson", "spearman", "loss"}
    assert parse_value(" 3.4 ", (0.0, 5.0)) == 3.4
    assert parse_value("9", (0.0, 5.0)) == 5.0 and parse_value("-1", (0.0, 5.0)) == 0.0
    assert parse_value("none", (0.0, 5.0)) == 2.5


def test_regression_with_a_head(make, write):
    rows = [{"sentence1": "a" * i, "sentence2": "b", "label": i / 4} for i in range(1, 9)]
    folder = str(write("stsb", train=rows, validation=rows))
    made = spread(make("tiny-roberta", name="stsb", data_dir=folder))
    assert made.ready.loss_kind == "mse" and made.bundle.model.config.num_labels == 1
    batch = made.batch(3)
    outputs = made.bundle.model(**batch.inputs)
    values, labels = made.ready.logits(outputs, batch)
    assert values.shape == (3, 1) and labels.tolist() == [example.label for example in made.task.train[:3]]
    expected = (outputs.logits.squeeze(-1) - labels).square().sum()
    torch.testing.assert_close(made.ready.loss_sum(outputs, batch), expected)
    assert made.ready.majority_baseline == {"pearson": 0.0, "spearman": 0.0}


def test_majority_baseline(make):
    made = make("tiny-bert", train_examples=None, eval_examples=None)
    same = [example.label for example in made.task.validation]
    share = sum(same) / len(same)
    baseline = made.ready.majority_baseline
    assert baseline["accuracy"] == pytest.approx(share)
    assert baseline["f1"] == pytest.approx(2 * share / (1 + share))
    assert set(made.ready.baseline("test")) == {"accuracy", "f1"}


def test_a_batch_moves_whole(make):
    made = make("tiny-t5")
    moved = made.batch(2).to("meta")
    tensors = [*moved.inputs.values(), moved.labels, moved.example_ids, moved.positions]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
