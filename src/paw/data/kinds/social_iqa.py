"""Social IQa (arXiv 1904.09728): a situation, a question about it, three answers."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["READS", "normalise", "own", "render"]

READS = {"context"}  # of rows of one's own, beside what all have


def normalise(row: Row) -> Row:
    return {
        "question": f"{row['context']} {row['question']}",
        "choices": [row["answerA"], row["answerB"], row["answerC"]],
        "labels": ["1", "2", "3"],
        "answer": str(row["label"]).strip(),
    }


def own(row: Row) -> Row:
    """Rows of one's own may have the situation in a field of its own."""
    return row | {"question": f"{row['context']} {row['question']}"} if row.get("context") else row
