"""Tasks outside the two suites: sst5 trec snli (classes) and squad drop (free text).

Sources of the data: SST-5 (Socher et al. 2013), TREC (Li and Roth 2002; the six coarse classes), SNLI
(Bowman et al. 2015), SQuAD 1.1 (Rajpurkar et al. 2016), DROP (Dua et al. 2019). The prompts are our own.
"""

from __future__ import annotations

from dsso.tasks.base import Row, TaskSpec, answer_text


def _squad_answers(row: Row) -> tuple[str, ...]:
    return tuple(answer_text(text) for text in row["answers"]["text"])


def _drop_answers(row: Row) -> tuple[str, ...]:
    # an answer of several spans is one text; annotators' alternatives are not part of the hub's rows
    spans = [answer_text(span) for span in row["answers_spans"]["spans"]]
    return (", ".join(dict.fromkeys(spans)),)


SPECS = (
    TaskSpec(
        name="sst5",
        kind="classification",
        hub="SetFit/sst5",
        columns=("text",),
        fields=("text",),
        labels=("very negative", "negative", "neutral", "positive", "very positive"),
        verbalizer=("terrible", "bad", "okay", "good", "great"),
        template="Review: {text} The film is",
        metrics=("accuracy", "macro_f1"),
    ),
    TaskSpec(
        name="trec",
        kind="classification",
        hub="CogComp/trec",
        columns=("text",),
        fields=("text",),
        label_column="coarse_label",
        labels=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        verbalizer=("expression", "entity", "description", "human", "location", "number"),
        template="Question: {text} It asks for:",
        metrics=("accuracy", "macro_f1"),
        # published with two splits only
        splits={"validation": "test"},
    ),
    TaskSpec(
        name="snli",
        kind="classification",
        hub="stanfordnlp/snli",
        columns=("premise", "hypothesis"),
        fields=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        verbalizer=("yes", "maybe", "no"),
        template="Text: {premise} Claim: {hypothesis} Does the claim follow? Answer:",
        metrics=("accuracy",),
        unlabelled=(-1,),
    ),
    TaskSpec(
        name="squad",
        kind="text",
        hub="rajpurkar/squad",
        columns=("context", "question"),
        fields=("context", "question"),
        label_column="answers",
        template="Text: {context} Question: {question} Answer:",
        metrics=("text_f1", "exact_match"),
        answers=_squad_answers,
    ),
    TaskSpec(
        name="drop",
        kind="text",
        hub="ucinlp/drop",
        columns=("passage", "question"),
        fields=("passage", "question"),
        label_column="answers_spans",
        template="Text: {passage} Question: {question} Answer:",
        metrics=("text_f1", "exact_match"),
        answers=_drop_answers,
    ),
)
