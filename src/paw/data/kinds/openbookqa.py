"""OpenBookQA (arXiv 1809.02789): the choice completes the stem."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    return {
        "id": row["id"],
        "question": row["question_stem"],
        "choices": list(row["choices"]["text"]),
        "labels": list(row["choices"]["label"]),
        "answer": row["answerKey"].strip(),
    }
