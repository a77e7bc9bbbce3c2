"""WinoGrande (arXiv 1907.10641) by partial context: the same rest of the sentence after each
option."""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row
from paw.data.kinds import Kind
from paw.data.kinds.question import gold


def render(row: Row, dataset: DatasetConfig) -> Example:
    before, _, after = row["question"].partition("_")
    contexts = tuple(before + option for option in row["choices"])
    return Example(row["id"], contexts, (f" {after.strip()}",) * len(contexts), gold(row))


KIND = Kind(render=render)
