"""A prompt and its choices, each after one blank: ARC's form in the harness, and that of one's own files."""

from __future__ import annotations

from string import ascii_uppercase

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row


def normalise(row: Row) -> Row:
    return row


def render(row: Row, dataset: DatasetConfig) -> Example:
    context = dataset.prompt.format(**row)
    choices = tuple(f" {choice}" for choice in dataset.classes or row["choices"])
    return Example(
        row["id"], (context,) * len(choices), choices, row["labels"].index(row["answer"])
    )


def lettered(row: Row, dataset: DatasetConfig) -> Example:
    """The options in the prompt under A, B, C …, whatever their own labels; the letter is what is scored or written."""
    letters = ascii_uppercase[: len(row["choices"])]
    options = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)
    )
    context = dataset.letter_prompt.format(**(row | {"options": options}))
    return Example(
        row["id"],
        (context,) * len(letters),
        tuple(f" {x}" for x in letters),
        row["labels"].index(row["answer"]),
    )


def classified(row: Row, dataset: DatasetConfig) -> Example:
    """A row with its class among `labels`, the same for all rows; without labels the answer is a number to be found."""
    texts = tuple(str(row[key]) for key in ("text", "pair") if row.get(key) is not None) or (
        dataset.prompt.format(**row),
    )
    prompt = dataset.prompt.format(**row)
    if not row["labels"]:
        return Example(row["id"], (prompt,), ("value",), 0, texts, float(row["answer"]))
    names = tuple(map(str, dataset.classes or row.get("choices") or row["labels"]))
    return Example(
        row["id"], (prompt,) * len(names), names, row["labels"].index(row["answer"]), texts
    )
