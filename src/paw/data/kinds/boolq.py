"""BoolQ (arXiv 1905.10044): a passage and a question to be answered by yes or no."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    answer = (
        row["answer"] if "answer" in row else row["label"]
    )  # SuperGLUE has 0 and 1, google/boolq truth values
    return {
        "passage": row["passage"],
        "question": row["question"],
        "choices": ["no", "yes"],
        "labels": ["no", "yes"],
        "answer": {0: "no", 1: "yes"}.get(answer),
    }
