"""Prompt templates and verbalizers.

A template is text with `{name}` placeholders for the texts of an example; a masked-LM template has `{mask}`
where the answer belongs (at its end when it is left out). A verbalizer gives one word per class.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsso.config import removal
from dsso.errors import RecipeError
from dsso.tasks.base import Task

MASK = "mask"


@dataclass(frozen=True)
class Template:
    """A parsed prompt."""

    parts: tuple[tuple[str, str | None], ...]
    """Pairs of literal text and the name that follows it (None at the end)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Placeholders in order, `mask` included."""
        return tuple(name for _, name in self.parts if name is not None)

    def fill(self, texts: Mapping[str, str]) -> str:
        """The prompt of an example."""
        return "".join(literal + (texts[name] if name is not None else "") for literal, name in self.parts)

    def with_mask(self) -> Template:
        """The same template with a mask at its end, unless it has one."""
        if MASK in self.names:
            return self
        return Template((*self.parts, (" ", MASK)))


def parse_template(text: str, task: Task, masked: bool) -> Template:
    """Parse a prompt and check its placeholders.

    Args:
        text: the template.
        task: whose texts may be named.
        masked: whether `{mask}` is allowed.

    Raises:
        RecipeError: the braces do not match, or a text is named that the task does not have.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(
            f"the prompt cannot be parsed ({error})",
            where="dsso.task.prompt",
            got=text,
            remedy="write {{ and }} for braces that are meant as such",
        ) from error
    allowed = [*task.train[0].texts, *([MASK] if masked else [])]
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (name not in allowed or spec or conversion):
            raise RecipeError(
                "the prompt names a column that does not exist",
                where="dsso.task.prompt",
                got=name,
                allowed=allowed,
                remedy=f"use the texts of the task {task.spec.name!r}",
            )
        parts.append((literal, name))
    template = Template(tuple(parts))
    if not set(template.names) - {MASK}:
        raise RecipeError(
            "the prompt shows nothing of the example",
            where="dsso.task.prompt",
            got=text,
            remedy=f"name at least one of {', '.join('{' + name + '}' for name in task.train[0].texts)}",
        )
    if template.names.count(MASK) > 1:
        raise RecipeError("the prompt has more than one {mask}", where="dsso.task.prompt", got=text)
    return template


def choose_verbalizer(task: Task, words: Sequence[str] | None) -> tuple[str, ...]:
    """The words of the recipe, checked, or the task's own.

    Raises:
        RecipeError: the task has no classes, the number of words differs, or a word is empty or repeated.
    """
    where = "dsso.task.verbalizer"
    labels = task.spec.labels
    if words is None:
        return task.spec.verbalizer
    if task.spec.kind != "classification":
        raise RecipeError(
            f"the task {task.spec.name!r} has no classes, so a verbalizer has no meaning",
            where=where,
            got=list(words),
            remedy=removal("dsso.task.verbalizer"),
        )
    if len(words) != len(labels):
        raise RecipeError(
            f"the task {task.spec.name!r} has {len(labels)} classes, the verbalizer {len(words)} words",
            where=where,
            got=list(words),
            allowed=f"one word for each of {', '.join(labels)}",
        )
    stripped = tuple(word.strip() for word in words)
    if not all(stripped):
        raise RecipeError("a word of the verbalizer is empty", where=where, got=list(words))
    if len(set(stripped)) != len(stripped):
        raise RecipeError("two classes have the same word", where=where, got=list(words))
    return stripped
