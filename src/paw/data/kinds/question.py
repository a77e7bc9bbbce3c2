"""A prompt and its choices, each after one blank: ARC's form in the harness, and that of one's own files."""

from __future__ import annotations

from paw.config.schema import DatasetConfig
from paw.data.example import Example, Row


def normalise(row: Row) -> Row:
    return row


def render(row: Row, dataset: DatasetConfig) -> Example:
    context = dataset.prompt.format(**row)
    choices = tuple(f" {choice}" for choice in row["choices"])
    return Example(row["id"], (context,) * len(choices), choices, row["labels"].index(row["answer"]))
