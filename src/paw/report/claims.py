"""What the data allow to be said of a run's systems, as numbers; sentences.py has the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paw.evaluation.statistics import Gap, gap_recovered
from paw.report.compare import Comparison, adjust, calibrated, compare, likelihoods, scores
from paw.report.model import System


@dataclass(frozen=True)
class Effect:
    """What an adapter does to the base it sits on."""

    system: System
    versus: Comparison


@dataclass(frozen=True)
class Recovered:
    """How much of the gap between a base and its own adapter a transferred adapter closes."""

    system: System
    gap: Gap  # by accuracy where there is one
    by_likelihood: Gap  # of the gold answers: more power where questions are few
    # by accuracy with every answer given as often as it is right: what it tells apart; None where
    # questions have choices of their own
    calibrated: Gap | None = None


@dataclass(frozen=True)
class NotEligible:
    """By accuracy there is no gap to recover; by log-likelihood there may be one."""

    gap: Gap


@dataclass(frozen=True)
class Against:
    """The method against a control on the same questions."""

    system: System
    control: System
    versus: Comparison


Claim = Effect | Recovered | NotEligible | Against


def judge(
    transferred: Sequence[System], *, base: System, own: System, seed: int = 0
) -> list[Claim]:
    """Transferred adapters beside the target's base and its own adapter.

    Args:
        transferred: the method first, then its controls.
        own: the base with the adapter that was trained on it.
        seed: of the bootstrap.
    """
    if not transferred:
        return []
    (of, before), (_, after) = scores(base.records), scores(own.records)
    gold_before, gold_after = likelihoods(base.records), likelihoods(own.records)
    told_before, told_after = calibrated(base.records), calibrated(own.records)
    recovered = []
    for s in transferred:
        gap = gap_recovered(before, after, scores(s.records)[1], of, seed)
        gold = likelihoods(s.records)
        by_gold = gap_recovered(gold_before, gold_after, gold, "log-likelihood", seed)
        told, apart = calibrated(s.records), None
        if told_before is not None and told_after is not None and told is not None:
            apart = gap_recovered(told_before, told_after, told, "calibrated accuracy", seed)
        recovered.append(Recovered(s, gap, by_gold, apart))
    method, *controls = transferred
    gap = recovered[0].gap
    by = not gap.eligible  # then methods are told apart by what has more power
    effects = [Effect(s, compare(s, base, seed=seed)) for s in transferred]
    against = [
        Against(method, c, compare(method, c, seed=seed, by_likelihood=by)) for c in controls
    ]
    no_gap = [] if gap.eligible else [NotEligible(gap)]
    return [*no_gap, *recovered, *_adjusted([*effects, *against])]


def beside(base: System, adapted: Sequence[System], *, seed: int = 0) -> list[Claim]:
    """Adapters compared with the base that they sit on."""
    return [*_adjusted([Effect(s, compare(s, base, seed=seed)) for s in adapted])]


def _adjusted(claims: Sequence[Effect | Against]) -> list[Effect | Against]:
    """The same claims, p adjusted for all of their comparisons."""
    versus = adjust([c.versus for c in claims])
    return [replace(c, versus=v) for c, v in zip(claims, versus, strict=True)]


def recovered_by(system: System, claims: Sequence[Claim]) -> Recovered | None:
    found = (c for c in claims if isinstance(c, Recovered) and c.system is system)
    return next(found, None)


def comparisons_of(system: System, claims: Sequence[Claim]) -> list[Comparison]:
    """With its base; then, of the method, with each control."""
    return [c.versus for c in claims if isinstance(c, Effect | Against) and c.system is system]
