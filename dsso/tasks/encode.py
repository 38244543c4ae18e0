"""Examples to tokens: one coder for each form of input.

`ClassificationCoder` serves heads; `Seq2SeqCoder`, `CausalCoder` and `MaskedCoder` serve prompts. All labels
are aligned with the logits (what is predicted *at* a position), so that one rule picks the loss terms for
every form.

Dimensions: B examples, T tokens, N loss terms, C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsso.errors import RecipeError
from dsso.tasks.base import Example, TaskSpec
from dsso.tasks.data import IGNORE, Batch, Encoded, pad, token_positions
from dsso.tasks.prompts import MASK, Template


class Coder(Protocol):
    """Turns examples into tokens and tokens into batches."""

    class_ids: list[list[int]]
    """Tokens that score each class; empty for heads, free text and regression."""

    def encode(self, example: Example) -> Encoded:
        """Tokenize one example."""

    def candidate(self, encoded: Encoded, label: int) -> Encoded:
        """The same input with the scoring tokens of class `label` as its target."""

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Tokenized examples, padded on the right, as one batch."""

    def terms(self, encoded: Encoded) -> int:
        """Number of loss terms of an example."""


def cut(
    texts: Mapping[str, str], names: Sequence[str], budget: int, count: Callable[[Mapping[str, str]], int]
) -> dict[str, str]:
    """Cut the end of the longest text, again and again, until there are at most `budget` tokens.

    Args:
        texts: texts by name.
        names: texts that may be cut.
        budget: most tokens, special ones included.
        count: number of tokens that the texts make together.

    Raises:
        RecipeError: even with empty texts there are too many.
    """
    texts = dict(texts)
    while (length := count(texts)) > budget:
        longest = max(names, key=lambda name: len(texts[name]))
        size = len(texts[longest])
        if size == 0:
            raise RecipeError(
                "the prompt alone is longer than the limit",
                where="dsso.task.max_length",
                got=budget,
                remedy=f"allow at least {length} tokens, or shorten dsso.task.prompt",
            )
        # characters per token differ between texts: cut in proportion, at least one, and count again
        texts[longest] = texts[longest][: min(size - 1, size * budget // length)].rstrip()
    return texts


def fit(template: Template, texts: Mapping[str, str], budget: int, count: Callable[[str], int]) -> str:
    """Fill a template with at most `budget` tokens.

    The template's own words and the shorter texts stay whole: a question behind a long passage is not lost.

    Args:
        template: the prompt.
        texts: texts by name.
        budget: most tokens, special ones included.
        count: number of tokens of a prompt.

    Raises:
        RecipeError: even with empty texts the prompt is too long.
    """
    names = [name for name in dict.fromkeys(template.names) if name != MASK]
    return template.fill(cut(texts, names, budget, lambda shorter: count(template.fill(shorter))))


def tokenize(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids of a text, without the tokenizer's remarks about its length."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def continuation(tokenizer: Any, word: str) -> list[int]:
    """Token ids of ` word` as it stands behind a prompt.

    Tokenizers treat the start of a text in their own ways, so the word is taken out of a context.
    """
    context = tokenize(tokenizer, ":", special=False)
    joint = tokenize(tokenizer, f": {word}", special=False)
    if joint[: len(context)] == context:
        return joint[len(context) :]
    return tokenize(tokenizer, f" {word}", special=False)


def class_tokens(
    words: Sequence[str], encode: Callable[[str], list[int]], unknown: int | None, end: int | None
) -> list[list[int]]:
    """Tokens that score each class.

    The end of the sequence belongs to them only if one word's tokens begin another's, which would be unfair
    otherwise.

    Raises:
        RecipeError: a word has no token, or two words have the same ones.
    """
    found = [encode(word) for word in words]
    for word, ids in zip(words, found, strict=True):
        if not ids or all(token == unknown for token in ids):
            raise RecipeError(
                "the tokenizer does not know a word of the verbalizer",
                where="dsso.task.verbalizer",
                got=word,
                remedy="choose another word",
            )
    if len({tuple(ids) for ids in found}) != len(found):
        raise RecipeError(
            "two words of the verbalizer have the same tokens",
            where="dsso.task.verbalizer",
            got=list(words),
            remedy="choose words that the tokenizer tells apart",
        )
    begins = any(a is not b and b[: len(a)] == a for a in found for b in found)
    return [[*ids, end] for ids in found] if begins and end is not None else found


def target_text(spec: TaskSpec, example: Example, words: Sequence[str]) -> str:
    """What a text-to-text or causal model learns to write."""
    if spec.kind == "text":
        return example.answers[0]
    assert example.label is not None
    if spec.kind == "classification":
        return words[int(example.label)]
    return f"{round(example.label / spec.value_step) * spec.value_step:.1f}"


def _padded_inputs(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `token_type_ids` (where there are any) with their mask, each `[B, T]`."""
    inputs = {
        "input_ids": pad([one["input_ids"] for one in examples], pad_id),
        "attention_mask": pad([[1] * len(one["input_ids"]) for one in examples], 0),
    }
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = pad([one["token_type_ids"] for one in examples], 0)
    return inputs


def _token_batch(inputs: dict[str, Tensor], labels: Tensor, indices: Sequence[int]) -> Batch:
    positions = token_positions(labels)
    return Batch(inputs, labels, torch.tensor(list(indices), dtype=torch.int64), len(positions), positions)


class ClassificationCoder:
    """One or two texts, and a class or a value as label.

    Args:
        spec: the task.
        tokenizer: its tokenizer.
        max_length: most tokens.
        joined: join the two texts with a line break instead of the tokenizer's separator (causal models).
    """

    def __init__(self, spec: TaskSpec, tokenizer: Any, max_length: int, joined: bool) -> None:
        self.spec, self.tokenizer, self.max_length, self.joined = spec, tokenizer, max_length, joined
        self.class_ids: list[list[int]] = []

    def encode(self, example: Example) -> Encoded:
        """Tokenize one example; the longer text is cut first."""
        texts = {name: example.texts[name] for name in self.spec.fields}
        if self.joined:
            texts = {"both": "\n".join(texts.values())}
        options: dict[str, Any] = {"verbose": False}
        if self.tokenizer.is_fast:
            options |= {"truncation": True, "max_length": self.max_length}
        else:
            # tokenizers in Python remark on every pair that they cut
            texts = cut(texts, list(texts), self.max_length, self._length)
        made = self.tokenizer(*texts.values(), **options)
        encoded = {name: list(made[name]) for name in ("input_ids", "token_type_ids") if name in made}
        return {**encoded, "label": example.label}

    def _length(self, texts: Mapping[str, str]) -> int:
        return len(self.tokenizer(*texts.values(), verbose=False)["input_ids"])

    def candidate(self, encoded: Encoded, label: int) -> Encoded:
        """The same input with another class."""
        return {**encoded, "label": label}

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Labels are `[B]`: int64 classes, or float32 values."""
        dtype = torch.float32 if self.spec.kind == "regression" else torch.int64
        labels = torch.tensor([one["label"] for one in examples], dtype=dtype)
        ids = torch.tensor(list(indices), dtype=torch.int64)
        return Batch(_padded_inputs(examples, self.tokenizer.pad_token_id), labels, ids, len(examples))

    def terms(self, encoded: Encoded) -> int:
        """One."""
        return 1


class Seq2SeqCoder:
    """A prompt for the encoder and a target text for the decoder.

    Args:
        spec: the task.
        tokenizer: its tokenizer.
        template: the prompt.
        words: the verbalizer.
        max_length: most tokens of the prompt.
        max_target_length: most tokens of the target.
        start: token that the decoder starts from.
    """

    def __init__(
        self,
        spec: TaskSpec,
        tokenizer: Any,
        template: Template,
        words: Sequence[str],
        max_length: int,
        max_target_length: int,
        start: int,
    ) -> None:
        self.spec, self.tokenizer, self.template, self.words = spec, tokenizer, template, words
        self.max_length, self.max_target_length, self.start = max_length, max_target_length, start
        self.end: int = tokenizer.eos_token_id
        self.class_ids = class_tokens(words, self._word, tokenizer.unk_token_id, self.end) if words else []

    def _word(self, word: str) -> list[int]:
        ids = list(self.tokenizer(text_target=word, verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def encode(self, example: Example) -> Encoded:
        """Tokenize one example; the target ends with the end of the sequence."""
        prompt = fit(
            self.template,
            example.texts,
            self.max_length,
            lambda text: len(tokenize(self.tokenizer, text, special=True)),
        )
        target = self._word(target_text(self.spec, example, self.words))[: self.max_target_length - 1]
        return {
            "input_ids": tokenize(self.tokenizer, prompt, special=True),
            "labels": [*target, self.end],
            "label": example.label,
        }

    def candidate(self, encoded: Encoded, label: int) -> Encoded:
        """The same prompt with the scoring tokens of class `label`."""
        return {**encoded, "labels": self.class_ids[label]}

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Labels are `[B, T_decoder]`; the decoder reads them shifted to the right."""
        pad_id = self.tokenizer.pad_token_id
        inputs = _padded_inputs(examples, pad_id)
        inputs["decoder_input_ids"] = pad([[self.start, *one["labels"][:-1]] for one in examples], pad_id)
        inputs["decoder_attention_mask"] = pad([[1] * len(one["labels"]) for one in examples], 0)
        return _token_batch(inputs, pad([one["labels"] for one in examples], IGNORE), indices)

    def terms(self, encoded: Encoded) -> int:
        """Target tokens, the end of the sequence included."""
        return len(encoded["labels"])


class CausalCoder:
    """A prompt and its continuation in one sequence; only the continuation carries loss terms.

    Args:
        spec: the task.
        tokenizer: its tokenizer.
        template: the prompt.
        words: the verbalizer.
        max_length: most tokens of prompt and continuation together.
        max_target_length: most tokens of the continuation.
    """

    def __init__(
        self,
        spec: TaskSpec,
        tokenizer: Any,
        template: Template,
        words: Sequence[str],
        max_length: int,
        max_target_length: int,
    ) -> None:
        self.spec, self.tokenizer, self.template, self.words = spec, tokenizer, template, words
        self.max_length, self.max_target_length = max_length, max_target_length
        self.end: int | None = tokenizer.eos_token_id
        unknown = tokenizer.unk_token_id
        self.class_ids = (
            class_tokens(words, lambda word: continuation(tokenizer, word), unknown, self.end)
            if words
            else []
        )

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = tokenize(self.tokenizer, prompt, special=True)
        # some tokenizers close every text; a prompt is open
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.end else ids

    def _target(self, example: Example) -> list[int]:
        if self.spec.kind == "classification":
            assert example.label is not None
            return self.class_ids[int(example.label)]
        text = target_text(self.spec, example, self.words)
        ids = continuation(self.tokenizer, text)[: self.max_target_length - 1]
        # generation must learn where to stop
        return ids if self.end is None else [*ids, self.end]

    def encode(self, example: Example) -> Encoded:
        """Tokenize one example."""
        target = self._target(example)
        longest = max(len(target), *(len(ids) for ids in self.class_ids)) if self.class_ids else len(target)
        prompt = fit(
            self.template, example.texts, self.max_length - longest, lambda text: len(self._prompt_ids(text))
        )
        return {"prompt_ids": self._prompt_ids(prompt), "target_ids": target, "label": example.label}

    def candidate(self, encoded: Encoded, label: int) -> Encoded:
        """The same prompt with the scoring tokens of class `label`."""
        return {**encoded, "target_ids": self.class_ids[label]}

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Labels are `[B, T]`, the next token at each position.

        Padding is on the right, so that real tokens stand at their natural positions.
        """
        whole = [{"input_ids": [*one["prompt_ids"], *one["target_ids"]]} for one in examples]
        labels = [[IGNORE] * (len(one["prompt_ids"]) - 1) + [*one["target_ids"], IGNORE] for one in examples]
        inputs = _padded_inputs(whole, self.tokenizer.pad_token_id)
        return _token_batch(inputs, pad(labels, IGNORE), indices)

    def terms(self, encoded: Encoded) -> int:
        """Tokens of the continuation."""
        return len(encoded["target_ids"])


class MaskedCoder:
    """A prompt with masks where the word of the class belongs.

    There are as many masks as the longest word has tokens; a shorter word is followed by separators.

    Args:
        spec: the task.
        tokenizer: its tokenizer, with a mask token.
        template: the prompt, with a mask.
        words: the verbalizer.
        max_length: most tokens.
    """

    def __init__(
        self, spec: TaskSpec, tokenizer: Any, template: Template, words: Sequence[str], max_length: int
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise RecipeError(
                "the tokenizer has no mask token, so the model cannot answer prompts",
                where="dsso.task.head",
                got="prompt",
                remedy='set it to "classification"',
            )
        self.spec, self.tokenizer, self.template, self.max_length = spec, tokenizer, template, max_length
        found = class_tokens(words, lambda word: continuation(tokenizer, word), tokenizer.unk_token_id, None)
        self.masks = max(len(ids) for ids in found)
        filler = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.class_ids = [[*ids, *[filler] * (self.masks - len(ids))] for ids in found]

    def encode(self, example: Example) -> Encoded:
        """Tokenize one example."""
        mask = self.tokenizer.mask_token
        texts = {name: text.replace(mask, " ") for name, text in example.texts.items()}
        prompt = fit(
            self.template,
            {**texts, MASK: mask * self.masks},
            self.max_length,
            lambda text: len(tokenize(self.tokenizer, text, special=True)),
        )
        made = self.tokenizer(prompt, verbose=False)
        assert example.label is not None
        encoded = {name: list(made[name]) for name in ("input_ids", "token_type_ids") if name in made}
        return {**encoded, "target_ids": self.class_ids[int(example.label)], "label": example.label}

    def candidate(self, encoded: Encoded, label: int) -> Encoded:
        """The same prompt with the word of class `label`."""
        return {**encoded, "target_ids": self.class_ids[label]}

    def _labels(self, encoded: Encoded) -> list[int]:
        target = iter(encoded["target_ids"])
        mask = self.tokenizer.mask_token_id
        return [next(target) if token == mask else IGNORE for token in encoded["input_ids"]]

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Labels are `[B, T]`, the word's tokens at the masks."""
        labels = pad([self._labels(one) for one in examples], IGNORE)
        return _token_batch(_padded_inputs(examples, self.tokenizer.pad_token_id), labels, indices)

    def terms(self, encoded: Encoded) -> int:
        """Number of masks."""
        return self.masks
