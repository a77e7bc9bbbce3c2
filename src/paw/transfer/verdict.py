"""What a transfer's own figures say of its chances, before anything is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of the way from chance to the same subspaces: bases of one origin are far above, others at 0.
RELATED = 0.5
# Held-out R² of the maps, mean of modules; see docs/methods.md for what pairs show.
ALIGNED = 0.2


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def feasibility(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """`copy`, `align`, `retrain` or `unknown`, and why in plain words.

    Args:
        rows: of the report, a module each.
    """
    phi, chance = mean(rows, "phi"), mean([r for r in rows if r.get("phi") is not None], "chance")
    into, out = mean(rows, "r2_in"), mean(rows, "r2_out")
    said = []
    if phi is None or chance is None:
        said.append(
            "The two models' weights are of different shapes, so they do not compare as they are."
        )
    else:
        said.append(
            f"The weights' top singular subspaces overlap by {phi:.2f} where chance is "
            f"{chance:.2f}."
        )
        if (phi - chance) / (1 - chance) >= RELATED:
            return _verdict("copy", said, COPY)
    if into is None or out is None:
        return _verdict("unknown", said, UNKNOWN)
    said.append(
        f"On positions held out of the fit the maps explain {into:.2f} of the variance of what "
        f"enters the modules and {out:.2f} of what leaves them (0 is chance)."
    )
    word, why = ("align", ALIGN) if min(into, out) >= ALIGNED else ("retrain", RETRAIN)
    return _verdict(word, said, why)


COPY = "The models are related: the adapter as it is (transfer=copy) is the thing to beat."
UNKNOWN = (
    "No text was run, so whether the maps carry activations over is not known: a method that looks "
    "at text would tell."
)
ALIGN = "There is something to align: the evaluation will show how much of the gain it carries."
RETRAIN = (
    "That is little to build on: expect a small part of the gain at best, and train on the target "
    "if its data are at hand."
)


def _verdict(word: str, said: list[str], why: str) -> tuple[str, str]:
    return word, " ".join([*said, why])
