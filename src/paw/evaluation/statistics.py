"""What may be said of a number: standard errors, paired tests, and the gap recovered with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
ELIGIBLE = 0.03  # of accuracy: below this there is nothing to recover
BLOCK = 1 << 24  # resampled values held at once

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """(transferred − base)/(own − base), with a paired bootstrap interval of 95 %.

    `of` says what was compared: accuracy, or the gold answer's log-likelihood per token where there is no accuracy.
    """

    of: str
    eligible: bool
    reason: str
    recovered: float | None
    low: float | None
    high: float | None


def standard_error(values: Sequence[float] | Vector) -> float:
    """Sample standard deviation over √n, as in the harness; infinite for one value."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf


def resampled_means(columns: Vector, seed: int = 0, resamples: int = RESAMPLES) -> Vector:
    """Bootstrap means of columns resampled together: (n × k) to (resamples × k). Rows are drawn as counts, so that a
    resample is one product of matrices."""
    rng, n = np.random.default_rng(seed), len(columns)
    step = max(1, BLOCK // n)
    parts = []
    for start in range(0, resamples, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        parts.append(counts @ columns / n)
    return np.concatenate(parts)


def gap_recovered(base: Vector, own: Vector, transferred: Vector, of: str, seed: int = 0) -> Gap:
    """The share of the gap between a base and its own adapter that a transferred adapter closes.

    Args:
        base, own, transferred: the same examples' scores, in the same order (n,).

    Ineligible where own − base is under three points (of accuracy) or its interval includes 0: there is nothing to
    recover, and the ratio means nothing.
    """
    gap = own - base
    means = resampled_means(np.stack([gap, transferred - base], axis=1), seed)
    low_gap, high_gap = np.percentile(means[:, 0], [2.5, 97.5])
    if low_gap <= 0 <= high_gap or gap.mean() < 0:
        return Gap(of, False, f"own − base is {gap.mean():+.3f}, interval [{low_gap:+.3f}, {high_gap:+.3f}]", None, None, None)
    if of == "accuracy" and gap.mean() < ELIGIBLE:
        return Gap(of, False, f"own − base is {gap.mean():+.3f}, under {ELIGIBLE}", None, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a gap bounds nothing
        ratios = np.where(means[:, 0] > 0, means[:, 1] / means[:, 0], np.copysign(np.inf, means[:, 1]))
    low, high = np.percentile(ratios, 2.5, method="lower"), np.percentile(ratios, 97.5, method="higher")
    return Gap(of, True, "", float((transferred - base).mean() / gap.mean()), float(low), float(high))


def mcnemar(before: Sequence[bool] | Vector, after: Sequence[bool] | Vector) -> tuple[int, int, float]:
    """Exact McNemar test of two systems on the same questions.

    Returns:
        Questions only `after` has right, questions only `before` has right, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
