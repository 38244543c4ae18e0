"""SuperGLUE (Wang et al. 2019, arXiv:1905.00537): boolq cb copa wic wsc multirc record (rte is in `glue.py`).

The labels are in the order of `aps/super_glue` on the hub; the prompts are our own. COPA and WSC become
questions with two answers, ReCoRD becomes free text: the entity that fills the gap.
"""

from __future__ import annotations

from dsso.tasks.base import Row, TaskSpec, answer_text

HUB = "aps/super_glue"


def _copa(row: Row) -> dict[str, str]:
    asked = "What was the cause?" if row["question"] == "cause" else "What happened as a result?"
    return {
        "premise": str(row["premise"]),
        "asked": asked,
        "choice1": str(row["choice1"]),
        "choice2": str(row["choice2"]),
        "question": f"{row['premise']} {asked}",
        "choices": f"A: {row['choice1']} B: {row['choice2']}",
    }


def _wsc(row: Row) -> dict[str, str]:
    claim = f"'{row['span2_text']}' stands for '{row['span1_text']}'"
    return {
        "text": str(row["text"]),
        "span1_text": str(row["span1_text"]),
        "span2_text": str(row["span2_text"]),
        "claim": claim,
    }


def _wic(row: Row) -> dict[str, str]:
    texts = {name: str(row[name]) for name in ("word", "sentence1", "sentence2")}
    return {**texts, "marked": f"{row['word']}: {row['sentence1']}"}


def _multirc(row: Row) -> dict[str, str]:
    texts = {name: str(row[name]) for name in ("paragraph", "question", "answer")}
    return {**texts, "candidate": f"{row['question']} {row['answer']}"}


def _multirc_group(row: Row) -> str:
    index = row["idx"]
    return f"{index['paragraph']}/{index['question']}"


def _record(row: Row) -> dict[str, str]:
    return {
        "passage": str(row["passage"]),
        "query": str(row["query"]),
        "entities": ", ".join(str(entity) for entity in row["entities"]),
    }


def _record_answers(row: Row) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer_text(answer) for answer in row["answers"]))


SPECS = (
    TaskSpec(
        name="boolq",
        kind="classification",
        hub=HUB,
        config="boolq",
        columns=("question", "passage"),
        fields=("question", "passage"),
        labels=("False", "True"),
        verbalizer=("no", "yes"),
        template="Text: {passage} Question: {question}? Answer:",
        metrics=("accuracy",),
    ),
    TaskSpec(
        name="cb",
        kind="classification",
        hub=HUB,
        config="cb",
        columns=("premise", "hypothesis"),
        fields=("premise", "hypothesis"),
        labels=("entailment", "contradiction", "neutral"),
        verbalizer=("yes", "no", "maybe"),
        template="Text: {premise} Claim: {hypothesis} Does the claim follow? Answer:",
        metrics=("accuracy", "macro_f1"),
    ),
    TaskSpec(
        name="copa",
        kind="classification",
        hub=HUB,
        config="copa",
        columns=("premise", "choice1", "choice2", "question"),
        fields=("question", "choices"),
        labels=("choice1", "choice2"),
        verbalizer=("A", "B"),
        template="{premise} {asked} A: {choice1} B: {choice2} Answer:",
        metrics=("accuracy",),
        render=_copa,
    ),
    TaskSpec(
        name="wic",
        kind="classification",
        hub=HUB,
        config="wic",
        columns=("word", "sentence1", "sentence2"),
        fields=("marked", "sentence2"),
        labels=("False", "True"),
        verbalizer=("no", "yes"),
        template="First: {sentence1} Second: {sentence2} Does '{word}' mean the same in both? Answer:",
        metrics=("accuracy",),
        render=_wic,
    ),
    TaskSpec(
        name="wsc",
        kind="classification",
        hub=HUB,
        config="wsc.fixed",
        columns=("text", "span1_text", "span2_text"),
        fields=("text", "claim"),
        labels=("False", "True"),
        verbalizer=("no", "yes"),
        template="{text} Does '{span2_text}' stand for '{span1_text}'? Answer:",
        metrics=("accuracy",),
        render=_wsc,
    ),
    TaskSpec(
        name="multirc",
        kind="classification",
        hub=HUB,
        config="multirc",
        columns=("paragraph", "question", "answer"),
        fields=("paragraph", "candidate"),
        labels=("False", "True"),
        verbalizer=("no", "yes"),
        template="Text: {paragraph} Question: {question} Is '{answer}' right? Answer:",
        metrics=("f1", "group_exact_match", "accuracy"),
        render=_multirc,
        group=_multirc_group,
        extra_columns=("idx",),
    ),
    TaskSpec(
        name="record",
        kind="text",
        hub=HUB,
        config="record",
        columns=("passage", "query"),
        fields=("passage", "query"),
        label_column="answers",
        template="Text: {passage} Sentence: {query} Names: {entities} Which name is @placeholder? Answer:",
        metrics=("text_f1", "exact_match"),
        render=_record,
        answers=_record_answers,
        extra_columns=("entities",),
    ),
)
