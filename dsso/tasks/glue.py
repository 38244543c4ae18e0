"""GLUE (Wang et al. 2019, arXiv:1804.07461): sst2 mrpc cola rte qnli stsb mnli wnli.

The labels are in the order of `nyu-mll/glue` on the hub; the prompts are our own.
"""

from __future__ import annotations

from dsso.tasks.base import TaskSpec

HUB = "nyu-mll/glue"

SPECS = (
    TaskSpec(
        name="sst2",
        kind="classification",
        hub=HUB,
        config="sst2",
        columns=("sentence",),
        fields=("sentence",),
        labels=("negative", "positive"),
        verbalizer=("bad", "good"),
        template="Review: {sentence} The film is",
        metrics=("accuracy",),
    ),
    TaskSpec(
        name="mrpc",
        kind="classification",
        hub=HUB,
        config="mrpc",
        columns=("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        verbalizer=("no", "yes"),
        template="First: {sentence1} Second: {sentence2} Do both say the same? Answer:",
        metrics=("f1", "accuracy"),
    ),
    TaskSpec(
        name="cola",
        kind="classification",
        hub=HUB,
        config="cola",
        columns=("sentence",),
        fields=("sentence",),
        labels=("unacceptable", "acceptable"),
        verbalizer=("no", "yes"),
        template="Sentence: {sentence} Is it grammatical? Answer:",
        metrics=("matthews", "accuracy"),
    ),
    TaskSpec(
        name="rte",
        kind="classification",
        hub=HUB,
        config="rte",
        columns=("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
        verbalizer=("yes", "no"),
        template="Text: {sentence1} Claim: {sentence2} Does the claim follow? Answer:",
        metrics=("accuracy",),
    ),
    TaskSpec(
        name="qnli",
        kind="classification",
        hub=HUB,
        config="qnli",
        columns=("question", "sentence"),
        fields=("question", "sentence"),
        labels=("entailment", "not_entailment"),
        verbalizer=("yes", "no"),
        template="Question: {question} Text: {sentence} Does the text hold the answer? Answer:",
        metrics=("accuracy",),
    ),
    TaskSpec(
        name="stsb",
        kind="regression",
        hub=HUB,
        config="stsb",
        columns=("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        template="First: {sentence1} Second: {sentence2} How similar are they, from 0.0 to 5.0? Answer:",
        metrics=("pearson", "spearman"),
        value_range=(0.0, 5.0),
    ),
    TaskSpec(
        name="mnli",
        kind="classification",
        hub=HUB,
        config="mnli",
        columns=("premise", "hypothesis"),
        fields=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        verbalizer=("yes", "maybe", "no"),
        template="Text: {premise} Claim: {hypothesis} Does the claim follow? Answer:",
        metrics=("accuracy",),
        splits={"validation": "validation_matched", "test": "test_matched"},
    ),
    TaskSpec(
        name="wnli",
        kind="classification",
        hub=HUB,
        config="wnli",
        columns=("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
        verbalizer=("no", "yes"),
        template="Text: {sentence1} Claim: {sentence2} Does the claim follow? Answer:",
        metrics=("accuracy",),
    ),
)
