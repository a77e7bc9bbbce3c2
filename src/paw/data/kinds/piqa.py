"""PIQA (arXiv 1911.11641): a goal and two solutions."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "labels": ["0", "1"],
        "answer": str(row["label"]),
    }
