"""Claims in words: one function per type of claim, one sentence for all draws of a placebo."""

from __future__ import annotations

from collections.abc import Sequence

from paw.evaluation.statistics import Gap
from paw.report.claims import (
    Against,
    Claim,
    Effect,
    NotEligible,
    Recovered,
    comparisons_of,
)
from paw.report.compare import Comparison
from paw.report.model import Draws, draws

EFFECT = {1: "a gain over", -1: "harm to", 0: "no significant effect versus"}
EVEN = "with every answer given as often as it is right"
AGAINST = {1: "is above", -1: "is below", 0: "is not significantly different from"}


def sentences(claims: Sequence[Claim]) -> list[str]:
    """What was recovered is said where accuracy has no gap; else the table shows it."""
    effects = (c for c in claims if isinstance(c, Effect))
    against = (c for c in claims if isinstance(c, Against))
    no_gap = [not_eligible(c.gap.of, c.gap.reason) for c in claims if isinstance(c, NotEligible)]
    recovered = [c for c in claims if no_gap and isinstance(c, Recovered)]
    return [
        *no_gap,
        *(_effect(several) for several in draws(effects, lambda c: c.system)),
        *(_recovered(several) for several in draws(recovered, lambda c: c.system)),
        *_told_apart(claims),
        *(_against(several) for several in draws(against, lambda c: c.control)),
    ]


def not_eligible(of: str, reason: str) -> str:
    return f"Not eligible: by {of} there is no gap to recover ({reason})."


def _effect(several: Draws[Effect]) -> str:
    """What an adapter does to its base; of several draws, how many do it."""
    first, *more = versus = [c.versus for c in several.found]
    if not more:
        return f"{several.name}: {EFFECT[first.verdict]} {first.versus}, {first}."
    gains, harms = _count(versus)
    return (
        f"{several.label}: {_range(versus)} against {first.versus}; {gains} a gain, {harms} harm, "
        f"{len(versus) - gains - harms} no significant effect."
    )


def _recovered(several: Draws[Recovered]) -> str:
    said = "By the gold answers' log-likelihood per token,"
    gaps = [c.by_likelihood for c in several.found]
    shares = [g.recovered for g in gaps if g.recovered is not None]
    if len(shares) < len(gaps):
        return f"{said} {several.name} has no gap to recover."
    if len(gaps) == 1:
        return f"{said} {several.name} recovers {_share(gaps[0])}."
    span = f"{min(shares):+.2f} to {max(shares):+.2f}"
    return f"{said} {several.label}, recover {span} of the gap."


def _told_apart(claims: Sequence[Claim]) -> list[str]:
    """Of gains by accuracy, whether they are shown to be more than how often each answer is given.
    Of placebos with several draws the table has it."""
    said = []
    for c in claims:
        if not isinstance(c, Recovered) or not c.gap.eligible or (gap := c.calibrated) is None:
            continue
        if not gap.eligible:  # of all, since it is the own adapter's
            return [f"{EVEN.capitalize()}, there is no gap to recover ({gap.reason})."]
        name, alone = c.system.name, c.system.group == c.system.name
        gains = comparisons_of(c.system, claims)[0].verdict == 1
        if gap.low is not None and gap.low <= 0 and gains and alone:
            said.append(f"Of what {name} gains nothing is shown to remain {EVEN}: {_share(gap)}.")
    return said


def _share(gap: Gap) -> str:
    return f"{gap.recovered:+.2f} of the gap [{gap.low:+.2f}, {gap.high:+.2f}]"


def _against(several: Draws[Against]) -> str:
    name, versus = several.found[0].system.name, [c.versus for c in several.found]
    if len(versus) == 1:
        return f"{name} {AGAINST[versus[0].verdict]} {versus[0].versus}: {versus[0]}."
    above, below = _count(versus)
    return (
        f"{name} is above {above} and below {below} of {len(versus)} draws of {several.name}: "
        f"{_range(versus)}, the lowest interval begins at {min(v.low for v in versus):+.3f}."
    )


def _count(versus: Sequence[Comparison]) -> tuple[int, int]:
    """How many are above, and how many are below."""
    verdicts = [v.verdict for v in versus]
    return verdicts.count(1), verdicts.count(-1)


def _range(versus: Sequence[Comparison]) -> str:
    found = [v.difference for v in versus]
    return f"{versus[0].of} {min(found):+.3f} to {max(found):+.3f}"
