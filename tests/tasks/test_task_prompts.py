"""Prompts, verbalizers, and how they become tokens."""

from __future__ import annotations

import pytest

from dsso.errors import RecipeError
from dsso.tasks.data import IGNORE
from dsso.tasks.encode import class_tokens, continuation, fit
from dsso.tasks.prompts import parse_template


def refusal(make, model="tiny-t5", **task):
    with pytest.raises(RecipeError) as caught:
        make(model, **task)
    return str(caught.value)


def test_a_prompt_that_names_an_unknown_column(make):
    text = refusal(make, prompt="{sentense1} Answer:")
    assert (
        "dsso.task.prompt" in text and "column that does not exist" in text and "nearest: 'sentence1'" in text
    )


def test_prompts_that_cannot_be_used(make):
    assert "cannot be parsed" in refusal(make, prompt="{sentence1")
    assert "shows nothing of the example" in refusal(make, prompt="Answer:")
    assert "more than one {mask}" in refusal(
        make, "tiny-bert", head="prompt", prompt="{sentence1} {mask} {mask}"
    )
    # only masked LMs have a mask
    assert "got: 'mask'" in refusal(make, prompt="{sentence1} {mask}")


def test_verbalizers_that_cannot_be_used(make, write):
    text = refusal(make, verbalizer=["yes", "no", "maybe"])
    assert "dsso.task.verbalizer" in text and "has 2 classes, the verbalizer 3 words" in text
    assert "different, same" in text
    assert "the same word" in refusal(make, verbalizer=["yes", "yes "])
    assert "is empty" in refusal(make, verbalizer=["yes", " "])
    row = {"sentence1": "a", "sentence2": "b", "label": 1.0}
    folder = str(write("stsb", train=[row] * 4, validation=[row] * 4))
    assert "no classes" in refusal(make, name="stsb", data_dir=folder, verbalizer=["a", "b"])


def test_words_that_the_tokenizer_does_not_tell_apart():
    table = {"yes": [5], "no": [5], "odd": [2], "none": []}
    with pytest.raises(RecipeError, match="have the same tokens"):
        class_tokens(["yes", "no"], table.__getitem__, 2, 1)
    for word in ("odd", "none"):
        with pytest.raises(RecipeError, match="does not know a word") as caught:
            class_tokens(["yes", word], table.__getitem__, 2, 1)
        assert f"got: '{word}'" in str(caught.value)


def test_the_end_counts_only_where_one_word_begins_another():
    table = {"no": [5], "yes": [6, 7], "not": [5, 8]}
    assert class_tokens(["no", "yes"], table.__getitem__, 2, 1) == [[5], [6, 7]]
    assert class_tokens(["no", "not"], table.__getitem__, 2, 1) == [[5, 1], [5, 8, 1]]


def test_the_longest_text_is_cut_and_the_question_stays(make):
    task = make("tiny-t5").task
    template = parse_template("Text: {sentence1} Question: {sentence2} Answer:", task, masked=False)
    texts = {"sentence1": "long " * 100, "sentence2": "who was it?"}
    prompt = fit(template, texts, 60, len)
    assert (
        len(prompt) <= 60 and prompt.endswith("Question: who was it? Answer:") and "Text: long long" in prompt
    )
    with pytest.raises(RecipeError, match="the prompt alone is longer") as caught:
        fit(template, texts, 20, len)
    assert "dsso.task.max_length" in str(caught.value)


def test_a_limit_that_no_prompt_fits_is_told_before_the_run(make):
    assert "dsso.task.max_length" in refusal(make, max_length=10)


def test_text_to_text_targets(make):
    made = make("tiny-t5", verbalizer=["no", "yes"])
    tokenizer, batch = made.bundle.tokenizer, made.batch(4)
    words = [["no", "yes"][example.label] for example in made.task.train[:4]]
    for row, word in enumerate(words):
        target = [token for token in batch.labels[row].tolist() if token != IGNORE]
        assert tokenizer.decode(target[:-1]) == word and target[-1] == tokenizer.eos_token_id
        assert batch.inputs["decoder_input_ids"][row, : len(target)].tolist() == [0, *target[:-1]]
        assert batch.inputs["decoder_attention_mask"][row].sum() == len(target) == made.ready.terms(row)
    assert batch.terms == sum(len(word) + 1 for word in words) == len(batch.positions)
    prompt = tokenizer.decode(batch.inputs["input_ids"][0], skip_special_tokens=True)
    assert prompt.startswith("First: ") and prompt.endswith("Answer:")


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_causal_targets_are_the_next_tokens(make, name):
    made = make(name)
    tokenizer, batch = made.bundle.tokenizer, made.batch(4)
    for row, example in enumerate(made.task.train[:4]):
        ids, labels = batch.inputs["input_ids"][row].tolist(), batch.labels[row].tolist()
        carrying = [column for column, label in enumerate(labels) if label != IGNORE]
        assert [labels[column] for column in carrying] == [ids[column + 1] for column in carrying]
        word = tokenizer.decode([labels[column] for column in carrying])
        assert word == f" {made.task.spec.verbalizer[example.label]}"
        assert tokenizer.decode(ids[: carrying[0] + 1]).endswith("Answer:")
        assert made.ready.terms(row) == len(carrying)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta"])
def test_masks_stand_where_the_answer_belongs(make, name):
    made = make(name, head="prompt", prompt="{sentence2} {mask} because {sentence1}", max_length=80)
    tokenizer, batch = made.bundle.tokenizer, made.batch(4)
    # " yes" has four bytes and " no" three, so one separator follows it
    words = {0: [*continuation(tokenizer, "no"), tokenizer.eos_token_id], 1: continuation(tokenizer, "yes")}
    for row, example in enumerate(made.task.train[:4]):
        labelled = batch.labels[row] != IGNORE
        assert batch.labels[row][labelled].tolist() == words[example.label]
        assert bool((batch.inputs["input_ids"][row][labelled] == tokenizer.mask_token_id).all())
        assert made.ready.terms(row) == 4


def test_a_mask_in_the_text_is_not_taken_for_the_answer(make, write):
    row = {"sentence": "a <mask> b", "label": 1}
    folder = str(write("sst2", train=[row] * 4, validation=[row] * 4))
    made = make("tiny-bert", name="sst2", data_dir=folder, head="prompt")
    ids = made.batch(1).inputs["input_ids"][0].tolist()
    assert ids.count(made.bundle.tokenizer.mask_token_id) == made.ready.terms(0)


def test_classification_pairs_are_cut_to_the_limit(make):
    made = make("tiny-bert", max_length=40)
    lengths = made.batch(8).inputs["attention_mask"].sum(1)
    assert lengths.min() >= 35 and lengths.max() <= 40
    first, second = made.bundle.tokenizer.decode(made.ready.train[0]["input_ids"]).split("</s>")[:2]
    whole = made.task.train[0].texts
    assert first and whole["sentence1"].startswith(first.strip())
    assert second and whole["sentence2"].startswith(second.strip())
