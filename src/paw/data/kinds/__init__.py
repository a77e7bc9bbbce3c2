"""One file per kind of data set, found by its name: `normalise` reads the hub's rows, `render` makes examples.

Normalised rows, which are also the form of local files: {id, question, choices, labels, answer} for questions with
choices, where answer is one of labels; {id, question, answer} for texts.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row


class Kind(Protocol):
    def normalise(self, row: Row) -> Row:
        """A row of the hub in normalised form."""

    def render(self, row: Row, dataset: DatasetConfig) -> Example:
        """A normalised row as contexts and continuations."""


def kind_named(name: str) -> Kind:
    """The kind in the file of that name, which the schema has checked."""
    return cast(Kind, import_module(f"paw.data.kinds.{name}"))
