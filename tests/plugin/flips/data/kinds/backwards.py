"""Questions whose words stand in opposite order."""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row
from paw.data.kinds import Kind, question


def render(row: Row, dataset: DatasetConfig) -> Example:
    words = " ".join(reversed(row["question"].split()))
    return question.render(row | {"question": words}, dataset)


KIND = Kind(render=render)
