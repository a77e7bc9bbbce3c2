"""What every data set becomes: contexts and continuations to be scored, and which one is right."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from paw.errors import DataError

Row = dict[str, Any]
Turns = tuple[tuple[str, str], ...]  # (role, content) of each message of a conversation


class BadRow(Exception):
    """A row that cannot be used: why, in words that are counted, and in a sentence of its own."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason, self.text = reason, text


@dataclass(frozen=True)
class Example:
    """One question. Choice i is `continuations[i]` after `contexts[i]`, which are mostly the same.

    A text with an answer and no alternatives has one choice: it has a likelihood but no accuracy.
    Of a conversation the context is its messages, which the model's own chat template puts into
    words.
    """

    id: str
    contexts: tuple[str | Turns, ...]
    continuations: tuple[str, ...]
    gold: int
    texts: tuple[str, ...] = ()  # one sentence or a pair, as an encoder reads it
    value: float | None = None  # what a regression is to find, instead of a class
    line: int = field(default=0, compare=False)  # in its file, for messages

    def solved(self) -> str:
        """The question with its answer, as a shot."""
        return _prompt(self.contexts[self.gold]) + self.continuations[self.gold]

    def after(self, before: str) -> Example:
        """The same question with a text in front of it."""
        return replace(self, contexts=tuple(before + _prompt(c) for c in self.contexts))


def context_of(found: Any) -> str | Turns:
    """A context as JSON holds it."""
    return found if isinstance(found, str) else tuple((role, content) for role, content in found)


def words(context: str | Turns) -> str:
    """A context as plain text, whoever said it."""
    return context if isinstance(context, str) else "\n".join(content for _, content in context)


def _prompt(context: str | Turns) -> str:
    if not isinstance(context, str):
        raise DataError(
            "evaluate.num_fewshot: conversations take no shots before them. Set it to 0."
        )
    return context
