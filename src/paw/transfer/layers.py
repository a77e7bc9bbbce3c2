"""Which layer of the source goes to which of the target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paw.errors import TransferError
from paw.models.tensors import linear_shapes
from paw.store import Input
from paw.transfer.modules import ROLES, Layers, by_layer

MATRIX = "similarity.json"  # of the artifact of stage `match`


def matched_layers(how: str, joined: bool, inputs: Mapping[str, Input]) -> Layers:
    """Matched layers (source, target) of two models.

    Args:
        how: transfer.layers.
        joined: transfer.spread.
        inputs: `source` and `target`, and `match` where layers are matched by similarity.
    """
    depths = [len(layers_of(inputs[side].path)) for side in ("source", "target")]
    if how == "proportional":
        layers = proportional(*depths)
    elif how == "index":
        layers = by_index(*depths)
    else:
        layers = aligned(similarities(inputs["match"])["similarity"])
    return spread(layers, *depths) if joined else layers


def similarities(match: Input) -> dict[str, Any]:
    """What stage `match` found: `similarity`, a row a layer of the target, and `by`."""
    found: dict[str, Any] = json.loads((match.path / MATRIX).read_text())
    return found


def layers_of(folder: Path) -> dict[int, dict[str, str]]:
    """A model's modules by layer and role.

    Raises:
        TransferError: for an architecture that has none which is known here.
    """
    found = by_layer(linear_shapes(folder))
    if not found:
        raise TransferError(
            f"{folder}: none of its weights is a {', '.join(ROLES)} of a layer; this architecture "
            "is not known here."
        )
    return found


def proportional(source: int, target: int) -> Layers:
    """Every target layer takes the source layer of the same relative depth."""
    return [(round(t * (source - 1) / max(1, target - 1)), t) for t in range(target)]


def by_index(source: int, target: int) -> Layers:
    """The same number; what one model has more stays out."""
    return [(i, i) for i in range(min(source, target))]


def aligned(similarity: Sequence[Sequence[float]]) -> Layers:
    """The order-preserving one-to-one matching of the largest total similarity (target layers ×
    source layers), by the dynamic programme of Needleman and Wunsch with free gaps; the deeper
    model's surplus stays out."""
    rows, columns = len(similarity), len(similarity[0])
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for t in range(rows):
        for s in range(columns):
            best[t + 1][s + 1] = max(best[t][s + 1], best[t + 1][s], best[t][s] + similarity[t][s])
    out, t, s = [], rows, columns
    while t and s:
        if best[t][s] == best[t - 1][s]:
            t -= 1
        elif best[t][s] == best[t][s - 1]:
            s -= 1
        else:
            t, s = t - 1, s - 1
            out.append((s, t))
    return out[::-1]


def spread(layers: Layers, source: int, target: int) -> Layers:
    """With the layers that a matching left out: each joins the partner of the nearest that was
    matched."""
    out = set(layers)
    for t in set(range(target)) - {t for _, t in layers}:
        out.add((min(layers, key=lambda pair: abs(pair[1] - t))[0], t))
    for s in set(range(source)) - {s for s, _ in layers}:
        out.add((s, min(layers, key=lambda pair: abs(pair[0] - s))[1]))
    return sorted(out, key=lambda pair: pair[::-1])
