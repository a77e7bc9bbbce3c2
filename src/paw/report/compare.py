"""Two systems on the same questions: difference, interval, flips and tests; and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from paw.evaluation.evaluate import Record
from paw.evaluation.statistics import Vector, holm, mcnemar, paired_t, resampled_means

LEVEL = 0.05


class Scored(Protocol):
    """A name and a record a question."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> list[Record]: ...


def scores(records: Sequence[Record]) -> tuple[str, Vector]:
    """Per question: right or wrong; or, where nothing is right or wrong, the gold answer's log-likelihood per token."""
    if any(r["correct"] is None for r in records):
        return "log-likelihood", likelihoods(records)
    return "accuracy", np.array([float(r["correct"]) for r in records])


def likelihoods(records: Sequence[Record]) -> Vector:
    """The gold answer's log-likelihood per token (nats), per question."""
    return np.array([r["loglikelihoods"][r["gold"]] / r["tokens"][r["gold"]] for r in records])


def compare(
    after: Scored, before: Scored, seed: int = 0, by_likelihood: bool = False
) -> dict[str, Any]:
    """Mean difference of two systems, its paired bootstrap interval and p; of accuracy, the flips and exact McNemar.

    Args:
        after, before: the same questions in the same order.
    """
    (of, a), (other, b) = scores(after.records), scores(before.records)
    if by_likelihood or of != other:
        of, a, b = "log-likelihood", likelihoods(after.records), likelihoods(before.records)
    low, high = np.percentile(resampled_means((a - b)[:, None], seed)[:, 0], [2.5, 97.5])
    out: dict[str, Any] = {
        "versus": before.name,
        "of": of,
        "n": len(a),
        "difference": float((a - b).mean()),
        "low": float(low),
        "high": float(high),
    }
    if of == "accuracy":
        out["gained"], out["lost"], out["p"] = mcnemar(b, a)
    else:
        out["p"] = paired_t(b, a)
    return out


def adjust(comparisons: Sequence[dict[str, Any]]) -> None:
    """Adds `p_holm`: p adjusted for all comparisons made at once."""
    for one, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        one["p_holm"] = p


def verdict(versus: dict[str, Any]) -> int:
    """1 for above, −1 for below, 0 for no significant difference: the interval must exclude 0 and the adjusted p be under .05."""
    if versus["low"] <= 0 <= versus["high"] or versus["p_holm"] >= LEVEL:
        return 0
    return 1 if versus["low"] > 0 else -1


def difference(versus: dict[str, Any]) -> str:
    text = (
        f"{versus['difference']:+.3f} {versus['of']} [{versus['low']:+.3f}, {versus['high']:+.3f}]"
    )
    flips = f", {versus['gained']} gained, {versus['lost']} lost" if "gained" in versus else ""
    adjusted = f", {versus['p_holm']:.2g} after Holm" if versus["p_holm"] != versus["p"] else ""
    return f"{text}{flips}, p = {versus['p']:.2g}{adjusted}"
