"""Every number and every sentence that a user reads is what it says it is, held against theory or against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from paw.evaluation.statistics import gap_recovered
from paw.report.compare import compare
from paw.report.records import Recorded

Z95 = 1.959964  # standard errors on either side of a mean that hold 95 % of a normal


def records(loglikelihoods: Any, correct: Any = None, tokens: int = 1) -> list[dict[str, Any]]:
    """Questions of one answer each, with the log-likelihoods given; or right and wrong."""
    found = [None] * len(loglikelihoods) if correct is None else [bool(c) for c in correct]
    return [
        {"id": str(i), "gold": 0, "correct": c, "loglikelihoods": [float(x)], "tokens": [tokens]}
        for i, (x, c) in enumerate(zip(loglikelihoods, found, strict=True))
    ]


# ---- intervals --------------------------------------------------------------------------------------


def test_a_difference_has_the_interval_of_95_percent() -> None:
    """That of theory, mean ± 1.96 standard errors; one of 90 % would be a sixth narrower."""
    rng = np.random.default_rng(0)
    before = rng.normal(-2.0, 1.0, 400)
    after = before + rng.normal(0.2, 0.5, 400)
    found = compare(Recorded("after", records(after)), Recorded("before", records(before)))
    error = (after - before).std() / math.sqrt(400)
    assert found["difference"] == pytest.approx((after - before).mean())
    assert found["difference"] - found["low"] == pytest.approx(Z95 * error, rel=0.05)
    assert found["high"] - found["difference"] == pytest.approx(Z95 * error, rel=0.05)


def test_a_gap_recovered_has_the_interval_of_95_percent() -> None:
    """That of theory for a ratio of means of paired samples (the delta method, Fieller's to first order)."""
    rng = np.random.default_rng(0)
    gap = rng.normal(1.0, 0.5, 600)
    moved = 0.6 * gap + rng.normal(0.0, 0.3, 600)
    found = gap_recovered(np.zeros(600), gap, moved, "log-likelihood")
    share = moved.mean() / gap.mean()
    error = (moved - share * gap).std() / math.sqrt(600) / gap.mean()
    assert found.recovered == pytest.approx(share)
    assert found.low == pytest.approx(share - Z95 * error, abs=0.1 * error)
    assert found.high == pytest.approx(share + Z95 * error, abs=0.1 * error)


@pytest.mark.parametrize(("errors", "eligible"), [(1.75, False), (2.2, True), (-2.2, False)])
def test_a_gap_is_one_where_its_interval_of_95_percent_excludes_0(errors: float, eligible: bool) -> None:
    """1.75 standard errors would do at 90 %; below 0 there is no gap, however clear the loss."""
    spread = np.random.default_rng(0).normal(size=500)
    spread = (spread - spread.mean()) / spread.std()
    gap = spread + errors / math.sqrt(500)
    assert gap_recovered(np.zeros(500), gap, gap, "log-likelihood").eligible is eligible
