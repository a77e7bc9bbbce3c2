"""Conversations, put into words by the model's own chat template.

Rows have messages of a role and a content. The last message of the assistant is trained on and
scored; what stands before it is its context, earlier answers included.
"""

from __future__ import annotations

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row
from paw.data.kinds import Kind


def render(row: Row, dataset: DatasetConfig) -> Example:
    turns = tuple((str(m["role"]), str(m["content"])) for m in row["messages"])
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise TypeError("no message of the assistant")
    return Example(row["id"], (turns[:last],), (turns[last][1],), 0)


KIND = Kind(render=render, written=True)
