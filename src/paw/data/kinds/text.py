"""A question and one written answer (GSM8K, MetaMathQA, Code-Feedback): trained on, and scored by its likelihood."""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row


def normalise(row: Row) -> Row:
    if "messages" in row:
        said = {
            m["role"]: m["content"] for m in reversed(row["messages"])
        }  # the first of each role
        return {"id": str(row["id"]), "question": said["user"], "answer": said["assistant"]}
    if "query" in row:
        return {"question": row["query"], "answer": row["response"]}
    return row


def render(row: Row, dataset: DatasetConfig) -> Example:
    return Example(row["id"], (dataset.prompt.format(**row),), (f" {row['answer']}",), 0)
