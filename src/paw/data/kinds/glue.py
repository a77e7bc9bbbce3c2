"""GLUE (arXiv 1804.07461): as prompts with verbal choices, as the harness words them, or as sentences and pairs to be classified."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]

PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)


def sentences(row: Row) -> tuple[str, ...]:
    """One sentence or a pair, under the names that any of the tasks has for them; nothing where a row has none of these."""
    for names in (("text", "pair"), *PAIRS, ("text",), ("sentence",)):
        if all(row.get(k) is not None for k in names):
            return tuple(str(row[k]).strip() for k in names)
    return ()


def normalise(row: Row) -> Row:
    """The raw fields stay, for prompts to name them. STS-B has a number and no labels, MNLI three, the others two."""
    label = row["label"]
    out: Row = {key: value for key, value in row.items() if isinstance(value, str)} | {
        "id": str(row["idx"])
    }
    first, second = next(
        (pair for pair in PAIRS if pair[0] in row and pair[1] in row), ("sentence", None)
    )
    out |= dict(zip(("text", "pair"), sentences(row), strict=False))
    if first in ("sentence1", "question1"):
        said = "Sentence" if first == "sentence1" else "Question"
        out["question"] = f"{said} 1: {row[first]}\n{said} 2: {row[second or '']}"
    elif second is None:
        out["question"] = row["sentence"].strip()
    if isinstance(label, float):
        return out | {"choices": [], "labels": [], "answer": label}
    choices = ["no", "yes"] if second else ["negative", "positive"]
    if first == "premise":
        choices = ["True", "Neither", "False"]
    return out | {
        "choices": choices,
        "labels": [str(i) for i in range(len(choices))],
        "answer": str(label),
    }
