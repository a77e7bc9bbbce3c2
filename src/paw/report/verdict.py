"""The one sentence that a run comes to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paw.report.sentences import EVEN, not_eligible

Json = Mapping[str, Any]


def verdict(found: Json) -> str:
    """What a run shows, with its interval, beside its placebos; empty where nothing can be said.

    Args:
        found: what results.json holds.
    """
    stopped = next((text for text in found["said"] if text.startswith("Unfinished:")), None)
    if stopped is not None:
        return str(stopped)
    method = transferred(found)
    if method is None:
        return _first(found["said"])
    gap = method["gap"]
    name = method["system"].removeprefix("target + ")
    if not gap["eligible"]:
        return not_eligible(gap["of"], gap["reason"])
    said = f"{name} recovers {_share(gap)} of the gap"
    for who, shares in _placebos(found["systems"]).items():
        mean = sum(shares) / len(shares)
        said += f"; {who.removeprefix('target + ')} {_percent(mean)} "
        said += f"({_percent(min(shares))} to {_percent(max(shares))})"
    if told := method.get("calibrated"):
        said += f"; {EVEN} {_share(told) if told['eligible'] else 'there is no gap'}"
    return f"{said}."


def transferred(found: Json) -> Json | None:
    """The system that was asked for, and judged first: refined, where there is refinement."""
    name, judged = found.get("method"), [s for s in found["systems"] if s.get("gap")]
    return next((s for s in judged if s["system"] == name), judged[0] if judged else None)


def _first(said: Sequence[str]) -> str:
    """The first sentence of what a task says; a generator's own."""
    parts = [line for text in said for line in text.split("\n\n") if "|" not in line]
    plain = [line for line in parts if not line.startswith("Warning:")]
    first = plain[-1 if "Generated adapters" in "".join(plain) else 0] if plain else ""
    return re.split(r"(?<=[.:)]) (?=[A-Z])", first)[0]


def _placebos(systems: Sequence[Json]) -> dict[str, list[float]]:
    """Shares of the gap, of placebos that were drawn several times."""
    out: dict[str, list[float]] = {}
    for s in systems:
        if s.get("draw_of") != s["system"] and s.get("gap_recovered") is not None:
            out.setdefault(s["draw_of"], []).append(s["gap_recovered"])
    return out


def _share(gap: Json) -> str:
    return f"{_percent(gap['recovered'])} [{_percent(gap['low'])}, {_percent(gap['high'])}]"


def _percent(share: float | None) -> str:
    return "unbounded" if share is None else f"{share:.0%}".replace("-", "−").replace("%", " %")
