"""Which modules are transferred: those similar enough, in the most similar layers."""

from __future__ import annotations

import math

from paw.errors import TransferError
from paw.transfer.config import TransferConfig
from paw.transfer.figures import Row
from paw.transfer.modules import layer_of

# Where a row of the report has each.
SCALES = {"raw": "similarity", "excess": "excess", "weights": "weights"}
SHOWN = (1e-4, 1e-3, 1e-2)  # thresholds whose effect a report always shows


def gate(rows: list[Row], c: TransferConfig) -> dict[str, int]:
    """Marks what is transferred: similar enough, and in one of the most similar layers.

    Returns:
        How many modules each of several thresholds leaves; nothing for a method that measures no
        similarity.

    Raises:
        TransferError: if nothing is transferred.
    """
    scale = SCALES[c.similarity]
    if not rows:
        raise TransferError(
            f"transfer.modules={c.modules}: transfer={c.method} adapts none of these. Leave it out."
        )
    for row in rows:
        row["transferred"] = scale not in row or row[scale] >= c.similarity_threshold
    if not any(row["transferred"] for row in rows):
        best = max(row[scale] for row in rows)
        raise TransferError(
            f"transfer.similarity_threshold={c.similarity_threshold:g} lets no module through "
            f"(the largest {c.similarity} similarity is {best:.4g}). Lower it."
        )
    if c.keep_top < 1:
        _keep_top(rows, scale, c)
    return {
        f"{threshold:g}": len({row["target"] for row in rows if row[scale] >= threshold})
        for threshold in sorted({*SHOWN, c.similarity_threshold})
        if scale in rows[0]
    }


def _keep_top(rows: list[Row], scale: str, c: TransferConfig) -> None:
    """Unmarks all layers of the target but the share whose modules are the most similar."""
    if scale not in rows[0]:
        raise TransferError(
            f"transfer.keep_top: transfer={c.method} measures no similarity of layers. "
            "Leave it at 1."
        )
    layers: dict[int, list[Row]] = {}
    for row in rows:
        layers.setdefault(layer_of(row["target"])[0], []).append(row)
    order = sorted(layers, key=lambda i: -sum(row[scale] for row in layers[i]) / len(layers[i]))
    for layer in order[math.ceil(c.keep_top * len(order)) :]:
        for row in layers[layer]:
            row["transferred"] = False
