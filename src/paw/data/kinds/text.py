"""A question and one written answer: trained on, and scored by its likelihood.

Beside normalised rows it reads those of MetaMathQA (query, response) and Code-Feedback (messages).
"""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import BadRow, Example, Row
from paw.data.kinds import Kind


def normalise(row: Row) -> Row:
    if "messages" in row:
        # the first of each role
        said = {m["role"]: m["content"] for m in reversed(row["messages"])}
        return {"id": str(row["id"]), "question": said["user"], "answer": said["assistant"]}
    if "query" in row:
        return {"question": row["query"], "answer": row["response"]}
    return row


def render(row: Row, dataset: DatasetConfig) -> Example:
    if row["answer"] is None:
        raise BadRow("no answer", "its answer is null.")
    return Example(row["id"], (dataset.prompt.format(**row),), (f" {row['answer']}",), 0)


KIND = Kind(render=render, normalise=normalise, written=True)
