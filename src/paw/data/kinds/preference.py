"""A prompt with two answers, the chosen one before the rejected one, for task=prefer.

Rows are {prompt, chosen, rejected}, or have other fields that dataset.prompt names.
"""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import BadRow, Example, Row
from paw.data.kinds import Kind


def normalise(row: Row) -> Row:
    """Several pairs may share an id, which is mostly the prompt's: rows are known by their line."""
    return {key: value for key, value in row.items() if key != "id"}


def render(row: Row, dataset: DatasetConfig) -> Example:
    prompt = str(row["prompt"]) if "prompt" in row else dataset.prompt.format(**row)
    answers = str(row["chosen"]), str(row["rejected"])
    if answers[0].strip() == answers[1].strip():
        raise BadRow(
            "two equal answers", "both answers are the same, so neither is to be preferred."
        )
    return Example(row["id"], (prompt,) * 2, answers, 0)


KIND = Kind(render=render, normalise=normalise, written=True)
