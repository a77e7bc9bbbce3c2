"""WinoGrande (arXiv 1907.10641) by partial context: the same rest of the sentence after each option."""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row


def normalise(row: Row) -> Row:
    return {
        "question": row["sentence"],
        "choices": [row["option1"], row["option2"]],
        "labels": ["1", "2"],
        "answer": row["answer"],
    }


def render(row: Row, dataset: DatasetConfig) -> Example:
    before, _, after = row["question"].partition("_")
    contexts = tuple(before + option for option in row["choices"])
    return Example(
        row["id"],
        contexts,
        (f" {after.strip()}",) * len(contexts),
        row["labels"].index(row["answer"]),
    )
