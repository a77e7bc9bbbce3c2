"""A prompt and its choices, each after one blank: ARC's form in the harness, and that of one's own
files."""

from __future__ import annotations

from string import ascii_uppercase

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row
from paw.data.fields import texts
from paw.data.kinds import Kind


def render(row: Row, dataset: DatasetConfig) -> Example:
    context = dataset.prompt.format(**row)
    choices = tuple(f" {choice}" for choice in dataset.classes or row["choices"])
    return Example(row["id"], (context,) * len(choices), choices, gold(row))


def lettered(row: Row, dataset: DatasetConfig) -> Example:
    """The options in the prompt under A, B, C …, whatever their own labels; the letter is what is
    scored or written."""
    letters = ascii_uppercase[: len(row["choices"])]
    options = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)
    )
    context = dataset.letter_prompt.format(**(row | {"options": options}))
    choices = tuple(f" {letter}" for letter in letters)
    return Example(row["id"], (context,) * len(choices), choices, gold(row))


def classified(row: Row, dataset: DatasetConfig) -> Example:
    """A row with its class among `labels`, the same for all rows; without labels the answer is a
    number to be found."""
    prompt = dataset.prompt.format(**row)
    read = texts(row) or (prompt,)
    if not row["labels"]:
        return Example(row["id"], (prompt,), ("value",), 0, read, float(row["answer"]))
    classes = tuple(map(str, dataset.classes or row.get("choices") or row["labels"]))
    return Example(row["id"], (prompt,) * len(classes), classes, gold(row), read)


def gold(row: Row) -> int:
    """The place of the answer among the labels.

    Raises:
        ValueError: where it is not among them.
    """
    place: int = row["labels"].index(row["answer"])
    return place


KIND = Kind(render=render)
