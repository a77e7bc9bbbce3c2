"""CommonsenseQA (arXiv 1811.00937): five options, which the harness letters in the prompt."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds import arc
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    found = arc.normalise(row)
    return found | {"question": found["question"].strip()}
