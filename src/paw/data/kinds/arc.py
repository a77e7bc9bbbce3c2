"""ARC (arXiv 1803.05457): labels are letters, or digits in a few rows."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "labels": list(row["choices"]["label"]),
        "answer": row["answerKey"],
    }
