"""One file per kind of data set, found by its name: it sets KIND.

Normalised rows, which are also the form of local files, are {id, question, choices, labels, answer}
for questions with choices, where answer is one of labels, and {id, question, answer} for texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paw import plugins
from paw.data import fields
from paw.data.config import DatasetConfig
from paw.data.example import Example, Row


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How rows become examples.

    Attributes:
        render: a normalised row as contexts and continuations. It may raise BadRow.
        normalise: a row of the hub in normalised form, where dataset.fields does not say it.
        version: raised when `normalise` reads rows differently, so that the cache is made anew.
        written: an answer is a text of its own, with no choices to letter or to classify.
    """

    render: Callable[[Row, DatasetConfig], Example]
    normalise: Callable[[Row], Row] = dict
    version: str = "1"
    written: bool = False


def kind_named(name: str) -> Kind:
    """The kind in the file of that name.

    Raises:
        ConfigError: where there is none.
    """
    found: Kind = plugins.load("data/kinds", name, "dataset.kind").KIND
    return found


def normalised(row: Row, dataset: DatasetConfig) -> Row:
    """A row of the hub in normalised form: as dataset.fields says, or else as the kind does."""
    if dataset.fields.answer:
        return fields.normalised(row, dataset.fields, dataset.classes)
    return kind_named(dataset.kind).normalise(row)
