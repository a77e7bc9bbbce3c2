"""HellaSwag (arXiv 1905.07830), cleaned as the harness cleans it."""

from __future__ import annotations

import re

from paw.data.example import Row
from paw.data.kinds import Kind
from paw.data.kinds.question import render


def normalise(row: Row) -> Row:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "question": clean(context),
        "choices": [clean(e) for e in row["endings"]],
        "labels": [str(i) for i in range(len(row["endings"]))],
        "answer": str(row["label"]),
    }


def clean(text: str) -> str:
    """WikiHow's marks removed; double blanks made single once, as the harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


KIND = Kind(render=render, normalise=normalise)
