"""Two systems on the same questions: their difference, its interval, and its tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from paw.evaluation.records import Record
from paw.evaluation.statistics import Vector, holm, mcnemar, paired_t, resampled_means

LEVEL = 0.05  # of significance


class Scored(Protocol):
    """A name, and a record per question."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> list[Record]: ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean difference between a system and another one, `versus`, over n questions.

    gained and lost count the questions that only this system, or only the other, has right.
    """

    versus: str
    of: str  # accuracy or log-likelihood (nats per token)
    n: int
    difference: float
    low: float  # of the paired bootstrap interval of 95 %
    high: float
    gained: int | None = None
    lost: int | None = None
    p: float  # of accuracy by the exact McNemar test, of log-likelihood by the paired t-test
    p_holm: float  # p, adjusted for all comparisons made at once

    @property
    def verdict(self) -> int:
        """1 for above, −1 for below, 0 for no significant difference.

        The interval must exclude 0, and the adjusted p must be under .05.
        """
        if self.low <= 0 <= self.high or self.p_holm >= LEVEL:
            return 0
        return 1 if self.low > 0 else -1

    def __str__(self) -> str:
        said = [f"{self.difference:+.3f} {self.of} [{self.low:+.3f}, {self.high:+.3f}]"]
        if self.gained is not None:
            said.append(f"{self.gained} gained, {self.lost} lost")
        said.append(f"p = {self.p:.2g}")
        if self.p_holm != self.p:
            said.append(f"{self.p_holm:.2g} after Holm")
        return ", ".join(said)

    def plain(self) -> dict[str, Any]:
        """The numbers for JSON; gained and lost are absent where they do not apply."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def scores(records: Sequence[Record]) -> tuple[str, Vector]:
    """What is compared, and its value per question (n,).

    1 for right and 0 for wrong; or, where a question cannot be right or wrong, likelihoods().
    """
    if any(r["correct"] is None for r in records):
        return "log-likelihood", likelihoods(records)
    return "accuracy", np.array([float(r["correct"]) for r in records])


def likelihoods(records: Sequence[Record]) -> Vector:
    """The gold answer's log-likelihood per token (nats), per question (n,)."""
    return np.array([r["loglikelihoods"][r["gold"]] / r["tokens"][r["gold"]] for r in records])


def calibrated(records: Sequence[Record]) -> Vector | None:
    """1 for right and 0 for wrong with every answer given as often as it is right (n,); None where
    questions have choices of their own."""
    if not all("prediction_calibrated" in r for r in records):
        return None
    return np.array([float(r["prediction_calibrated"] == r["gold"]) for r in records])


def compare(
    after: Scored, before: Scored, *, seed: int = 0, by_likelihood: bool = False
) -> Comparison:
    """after − before, by accuracy where both have it. `p_holm` is p until adjust() is called.

    Args:
        after, before: the same questions in the same order.
        seed: of the bootstrap.
    """
    (of, a), (other, b) = scores(after.records), scores(before.records)
    if by_likelihood or of != other:
        of, a, b = "log-likelihood", likelihoods(after.records), likelihoods(before.records)
    low, high = np.percentile(resampled_means((a - b)[:, None], seed)[:, 0], [2.5, 97.5])
    gained, lost, p = mcnemar(b, a) if of == "accuracy" else (None, None, paired_t(b, a))
    return Comparison(
        versus=before.name,
        of=of,
        n=len(a),
        difference=float((a - b).mean()),
        low=float(low),
        high=float(high),
        gained=gained,
        lost=lost,
        p=p,
        p_holm=p,
    )


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, p adjusted after Holm for all of them being made at once."""
    adjusted = holm([c.p for c in comparisons])
    return [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=True)]
