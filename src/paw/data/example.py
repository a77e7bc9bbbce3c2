"""What every data set becomes: contexts and continuations to be scored, and which one is right."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question. Choice i is `continuations[i]` after `contexts[i]`; most kinds have the same context for all.

    A text with an answer and no alternatives has one choice: it has a likelihood but no accuracy.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    line: int = field(default=0, compare=False)  # in its file, for messages

    def solved(self) -> str:
        """The question with its answer, as a shot."""
        return self.contexts[self.gold] + self.continuations[self.gold]

    def after(self, before: str) -> Example:
        """The same question with a text in front of it."""
        return replace(self, contexts=tuple(before + c for c in self.contexts))
