"""Social IQa (arXiv 1904.09728): a situation, a question about it, three answers."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    return {"question": f"{row['context']} {row['question']}", "choices": [row["answerA"], row["answerB"], row["answerC"]],
            "labels": ["1", "2", "3"], "answer": str(row["label"]).strip()}  # fmt: skip
