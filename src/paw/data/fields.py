"""dataset.fields: how the hub's rows become normalised rows, by templates instead of Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from string import Formatter
from typing import Any

from paw.data.example import Row
from paw.errors import ConfigError

Paths = tuple[tuple[str, ...], ...]


@dataclass(kw_only=True)
class FieldsConfig:
    """A template for each part of a normalised row.

    A template is text with the hub's fields in braces: "{goal}". "{choices.text}" is the field
    `text` of the object `choices`, "{answer|label}" the first of two that a row has, and
    "{sentence:strip}" has no blanks around it. The hub's texts and numbers stay in the row under
    their own names, so that dataset.prompt can name them, too.
    """

    # rows that lack what it names are known by the number of their line
    id: str = "{id}"
    question: str = ""
    # a field that is a list stands for all that is in it; no choices: dataset.classes
    choices: list[str] = field(default_factory=list)
    # no labels: the answer is a text, or a number to be found
    labels: list[str] = field(default_factory=list)
    # one of the labels; needed wherever another key is set
    answer: str = ""
    # the label that an answer means, by the answer's text: {"True": "yes", "False": "no"}
    answers: dict[str, str] = field(default_factory=dict)
    # a sentence or a pair, as an encoder reads them (evaluate.mode=classify); else the prompt
    text: str = ""
    pair: str = ""
    # the question as it is asked, over a normalised row that has all that this names
    asked: str = ""

    def __post_init__(self) -> None:
        templates = {key: value for key, value in vars(self).items() if key != "answers"}
        for key, value in templates.items():
            for template in [value] if isinstance(value, str) else value:
                names(f"dataset.fields.{key}", template, formats=False)
        rest = (self.question, self.choices, self.labels, self.answers, self.text, self.pair)
        if any(rest) and not self.answer:
            raise ConfigError("dataset.fields.answer: is missing. Name the field, as {label}.")


def names(key: str, template: str, formats: bool = True) -> list[str]:
    """The fields that a template names.

    Args:
        key: the configuration's, for messages.
        formats: what Python's format() knows may stand after a field's name; else only :strip.

    Raises:
        ConfigError: for a template that cannot be filled.
    """
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as e:
        raise ConfigError(
            f"{key}: {e}. Write fields as {{question}}, and a brace itself as {{{{ or }}}}."
        ) from None
    for name, how, conversion in parts:
        if not re.match(r"[A-Za-z_]", str(name)):
            raise ConfigError(f"{key}: a field has no name. Write fields as {{question}}.")
        if not formats and (conversion or how not in ("", "strip")):
            raise ConfigError(f"{key}: only :strip may follow a field's name: {{{name}:strip}}.")
    return [str(name) for name, _, _ in parts]


def normalised(row: Row, fields: FieldsConfig, classes: Sequence[str]) -> Row:
    """A row of the hub as {id, question, choices, labels, answer}, beside its own fields.

    Raises:
        KeyError: for a field that the row lacks.
    """
    out: Row = {key: value for key, value in row.items() if isinstance(value, (str, int, float))}
    for key in ("question", "text", "pair"):
        if template := getattr(fields, key):
            out[key] = filled(template, row)
    with suppress(KeyError):
        out["id"] = filled(fields.id, row)
    answer = filled(fields.answer, row)
    return out | {
        "choices": _several(fields.choices, row) or list(classes),
        "labels": _several(fields.labels, row),
        "answer": fields.answers.get(answer or "") if fields.answers else answer,
    }


def asked(row: Row, fields: FieldsConfig) -> Row:
    """A normalised row with its question as it is asked."""
    named = names("dataset.fields.asked", fields.asked)
    if named and all(row.get(name) for name in named):
        return row | {"question": filled(fields.asked, row)}
    return row


def sentences(row: Row, fields: FieldsConfig) -> tuple[str, ...]:
    """The sentence or the pair of a row that nobody has labelled, under the data set's names or as
    `text` and `pair`; () where it has neither."""
    with suppress(KeyError):
        row = row | {k: filled(t, row) for k in ("text", "pair") if (t := getattr(fields, k))}
    return texts(row)


def texts(row: Row) -> tuple[str, ...]:
    """The sentence or the pair that an encoder reads of a normalised row; () where it has none."""
    return tuple(str(row[key]) for key in ("text", "pair") if row.get(key) is not None)


def filled(template: str, row: Row) -> str | None:
    """A template's text; None where a field is null.

    Raises:
        KeyError: for a field that the row lacks.
    """
    out = ""
    for literal, paths, strip in _parsed(template):
        value = _value(row, paths) if paths else ""
        if value is None:
            return None
        out += literal + (str(value).strip() if strip else str(value))
    return out


@cache
def _parsed(template: str) -> tuple[tuple[str, Paths, bool], ...]:
    """By field: the text before it, where its value is looked for, whether it is stripped."""
    return tuple(
        (literal, tuple(tuple(p.split(".")) for p in (name or "").split("|") if p), how == "strip")
        for literal, name, how, _ in Formatter().parse(template)
    )


def _value(row: Row, paths: Paths) -> Any:
    for path in paths:
        value: Any = row
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                break
            value = value[name]
        else:
            return value
    raise KeyError(" or ".join(".".join(path) for path in paths))


def _several(templates: Sequence[str], row: Row) -> list[str | None]:
    out: list[str | None] = []
    for template in templates:
        _, paths, _ = _parsed(template)[0]
        value = _value(row, paths) if paths else None
        out += map(str, value) if isinstance(value, list) else [filled(template, row)]
    return out
