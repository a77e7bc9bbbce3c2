"""Answers of one prompt as few rows: what they have in common is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from paw.data.tokenise import Encoded, Shares

Prefix = tuple[int, ...]  # the tokens before a place


def folded(rows: Sequence[Encoded]) -> list[Encoded]:
    """Rows with the same loss, to rounding: at each place where answers go on, a token each, the
    cross-entropy to all that come next, each as much as its answers weigh. A place that several
    rows pass counts in one of them. The choices of a question are one row where they are one token
    each.

    Args:
        rows: without shares of their own.
    """
    if len(rows) == 1:
        return list(rows)
    next_to: dict[Prefix, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        for at in range(row.start, len(row.ids)):
            next_to[row.ids[:at]][row.ids[at]] += row.weight
    out, counted = list[Encoded](), set[Prefix]()
    for row in sorted(rows, key=lambda row: -len(row.ids)):  # short ones are often parts of longer
        places = [row.ids[:at] for at in range(row.start, len(row.ids))]
        if counted.issuperset(places):
            continue
        soft = tuple[Shares, ...](
            ((row.ids[len(p)], 0.0),) if p in counted else tuple(next_to[p].items()) for p in places
        )
        counted.update(places)
        out.append(replace(row, weight=1.0, soft=soft))
    return out
