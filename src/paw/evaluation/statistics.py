"""What may be said of a number: standard errors, paired tests, and the gap recovered with its
interval.

In closed forms on numpy and scipy.special: importing scipy.stats and statsmodels takes two seconds,
which every process would pay. Tests hold them against both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Z95 = 1.959963984540054  # the normal's quantile of 97.5 %
ELIGIBLE = 0.03  # of accuracy: below this there is nothing to recover
BLOCK, KEPT = 100, 2**23  # resamples at a time, and numbers of rows that are kept for the next call
FEW = 64  # different rows up to which counting them is quicker than drawing them

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """(transferred − base)/(own − base), with a paired bootstrap interval of 95 %.

    `of` says what was compared: accuracy; calibrated accuracy, every answer given as often as it is
    right (by constants that resamples take as they are); or the gold answer's log-likelihood per
    token where there is no accuracy.
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


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - reach if right else 0.0, middle + reach if right < n else 1.0


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its standard error and 95 % interval; nothing where there are no questions."""
    if not right:
        return {}
    low, high = interval(sum(right), len(right))
    mean, error = float(np.mean(right)), standard_error([float(x) for x in right])
    return {"accuracy": mean, "stderr": error, "low": low, "high": high}


def f1(gold: Sequence[bool], predicted: Sequence[bool]) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is positive."""
    hits = sum(g and p for g, p in zip(gold, predicted, strict=True))
    marked = sum(gold) + sum(predicted)
    return 2 * hits / marked if marked else 0.0


def resampled_means(columns: Vector, seed: int = 0, resamples: int = RESAMPLES) -> Vector:
    """Bootstrap means of columns resampled together: (n × k) to (resamples × k).

    Where rows repeat, as right and wrong do, how often each is drawn is all that counts: one
    multinomial draw a resample.
    """
    n = len(columns)
    kinds, counts = np.unique(columns, axis=0, return_counts=True)
    if len(kinds) <= FEW:
        rng = np.random.default_rng(seed)
        drawn: Vector = rng.multinomial(n, counts / n, size=resamples) @ kinds / n
        return drawn
    out, values = np.empty((resamples, columns.shape[1])), np.ascontiguousarray(columns.T)
    done = 0
    draws = _kept_draws if resamples * n <= KEPT else _draws
    for chosen in draws(n, seed, resamples):
        for k, column in enumerate(values):
            out[done : done + len(chosen), k] = column.take(chosen).sum(-1)
        done += len(chosen)
    return out / n


def _draws(n: int, seed: int, resamples: int) -> Iterator[Any]:
    """The rows of each resample (at most BLOCK × n), block after block."""
    rng, kind = np.random.default_rng(seed), np.uint16 if n <= 2**16 else np.uint32
    for done in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - done)
        yield np.stack([rng.integers(0, n, n, dtype=kind) for _ in range(size)]).astype(np.intp)


@lru_cache(maxsize=1)
def _kept_draws(n: int, seed: int, resamples: int) -> tuple[Any, ...]:
    """The same, kept: a table asks for them once for each of its rows."""
    return tuple(_draws(n, seed, resamples))


def gap_recovered(base: Vector, own: Vector, transferred: Vector, of: str, seed: int = 0) -> Gap:
    """The share of the gap between a base and its own adapter that a transferred adapter closes.

    Args:
        base, own, transferred: the same examples' scores, in the same order (n,).

    Ineligible where own − base is under three points (of accuracy) or its interval includes 0:
    there is nothing to recover, and the ratio means nothing.
    """
    gap = own - base
    means = resampled_means(np.stack([gap, transferred - base], axis=1), seed)
    low_gap, high_gap = np.percentile(means[:, 0], [2.5, 97.5])
    why = f"own − base is {gap.mean():+.3f}"
    if low_gap <= 0 <= high_gap or gap.mean() < 0:
        reason = f"{why}, interval [{low_gap:+.3f}, {high_gap:+.3f}]"
        return Gap(of, False, reason, None, None, None)
    if of.endswith("accuracy") and gap.mean() < ELIGIBLE:
        return Gap(of, False, f"{why}, under {ELIGIBLE}", None, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a gap bounds nothing
        endless = np.copysign(np.inf, means[:, 1])
        ratios = np.where(means[:, 0] > 0, means[:, 1] / means[:, 0], endless)
    low = float(np.percentile(ratios, 2.5, method="lower"))
    high = float(np.percentile(ratios, 97.5, method="higher"))
    return Gap(of, True, "", float((transferred - base).mean() / gap.mean()), low, high)


def mcnemar(
    before: Sequence[bool] | Vector, after: Sequence[bool] | Vector
) -> tuple[int, int, float]:
    """Exact McNemar test of two systems on the same questions.

    Returns:
        Questions only `after` has right, questions only `before` has right, and the two-sided
        p-value.
    """
    from scipy.special import bdtr

    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    if not gained + lost:
        return 0, 0, 1.0
    tail = float(bdtr(min(gained, lost), gained + lost, 0.5))
    return gained, lost, min(1.0, 2 * tail)


def paired_t(before: Vector, after: Vector) -> float:
    """Two-sided p-value of the paired t-test; 1 where nothing differs."""
    from scipy.special import stdtr

    off, n = after - before, len(before)
    if n < 2 or np.ptp(off) == 0:
        return 1.0
    t = off.mean() / (off.std(ddof=1) / math.sqrt(n))
    return float(2 * stdtr(n - 1, -abs(t)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons made at once, adjusted after Holm (1979)."""
    order, out, least = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = least
    return out
