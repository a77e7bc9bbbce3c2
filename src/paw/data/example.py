"""What every data set becomes: contexts and continuations to be scored, and which one is right."""

from __future__ import annotations

from dataclasses import dataclass
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
