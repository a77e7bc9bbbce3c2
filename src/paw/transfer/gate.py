"""Stage `gate`: the adapter of the modules that are transferred: those similar enough, in the most
similar layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paw.config.checks import transient
from paw.errors import TransferError
from paw.models.adapters import Factors, fused, stamp, write_adapter
from paw.models.tensors import module_parts
from paw.store import Input, Stage, Watch
from paw.transfer.config import TransferConfig
from paw.transfer.figures import Row
from paw.transfer.layers import layers_of
from paw.transfer.modules import layer_of
from paw.transfer.moved import read_moved
from paw.transfer.report import write_report
from paw.transfer.verdict import feasibility, mean

# Where a row of the report has each.
SCALES = {"raw": "similarity", "excess": "excess", "weights": "weights"}
SHOWN = (1e-4, 1e-3, 1e-2)  # thresholds whose effect a report always shows


MEANS = ("similarity", "chance", "weights", "kept_energy", "r2_in", "r2_out")


@dataclass(kw_only=True)
class GateStage:
    transfer: TransferConfig  # whole: the adapter's stamp holds it
    name: str | None = transient(None)  # the target's hub id; else it is named by its path


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Figures that are None were not measured: by a method without maps, or where no text was run.
    Means are over modules."""

    method: str
    coverage: float  # share of the source adapter's modules that were used
    target_modules: int
    target_coverage: float  # share of the target's modules that are adapted
    similarity: float | None = None
    chance: float | None = None  # of the similarity
    weights: float | None = None
    kept_energy: float | None = None
    r2_in: float | None = None
    r2_out: float | None = None
    left: dict[str, int] = field(default_factory=dict)  # modules that each threshold leaves
    feasibility: str = "unknown"
    why: str = ""
    gate: str = "raw"  # the similarity that thresholds are of

    def __str__(self) -> str:
        said = f"{self.target_modules} modules, {self.coverage:.0%} of the adapter"
        if self.gate == "weights" and self.left:
            left = ", ".join(f"{n} at {threshold}" for threshold, n in self.left.items())
            said += f"; modules left by threshold: {left}"
        return said


def gate(config: GateStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> GateResult:
    """
    Args:
        inputs: `moved`, a finished stage `transfer`, and the `adapter`, `source` and `target` that
            it read; `match` for the report's picture.

    Writes the adapter as a PEFT folder stamped with where it comes from, and a report: report.json
    with a row a module, report.md and report.png.

    Raises:
        TransferError: if nothing passes.
    """
    c, target, moved = config.transfer, inputs["target"], read_moved(inputs["moved"].path)
    rows = [row for _, row in moved.found]
    left = mark(rows, c)
    joined = _by_target(moved.found)
    write_adapter(out, fused(joined, module_parts(target.path)), config.name or str(target.path))
    used = {row["source"] for row in rows if row["transferred"]} & set(moved.modules)
    word, why = feasibility(rows)
    figures: dict[str, Any] = {
        "method": c.method,
        "coverage": len(used) / len(moved.modules),
        "target_modules": len(joined),
        "target_coverage": len(joined) / sum(map(len, layers_of(target.path).values())),
        **{key: mean(rows, key) for key in MEANS},
        "left": left,
        "feasibility": word,
        "why": why,
    }
    origin = {
        side: {"fingerprint": inputs[side].fingerprint, "path": str(inputs[side].path)}
        for side in ("adapter", "source", "target")
    }
    made = {"made_by": "transfer", "config": asdict(c), **origin, "figures": figures}
    stamp(out, target.fingerprint, **made)
    write_report(out, rows, figures, moved.layers, inputs.get("match"))
    return GateResult(**figures, gate=c.similarity)


STAGE = Stage("gate", "2", "paw.transfer.gate:gate", config=GateStage, result=GateResult)


def mark(rows: Sequence[Row], c: TransferConfig) -> dict[str, int]:
    """Marks what is transferred: similar enough, and in one of the most similar layers.

    Returns:
        How many modules each of several thresholds leaves; nothing for a method that measures no
        similarity.

    Raises:
        TransferError: if nothing is transferred.
    """
    scale = SCALES[c.similarity]
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


def _keep_top(rows: Sequence[Row], scale: str, c: TransferConfig) -> None:
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


def _by_target(found: Sequence[tuple[Factors, Row]]) -> dict[str, Factors]:
    """What is transferred to each module of the target."""
    parts: dict[str, list[Factors]] = {}
    for factors, row in found:
        if row["transferred"]:
            parts.setdefault(row["target"], []).append(factors)
    return {name: _joined(several) for name, several in parts.items()}


def _joined(found: list[Factors]) -> Factors:
    """Several sources' factors on one target module: added up, and cut to the largest of their
    ranks."""
    if len(found) == 1:
        return found[0]
    import torch

    from paw.transfer.linalg import recompress

    a, b = torch.cat([f.a for f in found]), torch.cat([f.b for f in found], dim=1)
    return Factors(*recompress(a, b, max(f.rank for f in found)))
