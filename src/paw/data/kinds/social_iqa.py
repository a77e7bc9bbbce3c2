"""Social IQa (arXiv 1904.09728): a situation, a question about it, three answers."""

from __future__ import annotations

from paw.config.schema import DatasetConfig
from paw.data.example import Example, Row
from paw.data.kinds import question


def normalise(row: Row) -> Row:
    return {
        "question": row["question"],
        "context": row["context"],
        "choices": [row["answerA"], row["answerB"], row["answerC"]],
        "labels": ["1", "2", "3"],
        "answer": str(row["label"]).strip(),
    }


def render(row: Row, dataset: DatasetConfig) -> Example:
    """One's own rows may hold the situation in a field of its own, or at the head of the question."""
    return question.render(whole(row), dataset)


def lettered(row: Row, dataset: DatasetConfig) -> Example:
    return question.lettered(whole(row), dataset)


def whole(row: Row) -> Row:
    situation = str(row.get("context") or "")
    return row | {"question": f"{situation} {row['question']}".strip()}
