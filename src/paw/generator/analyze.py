"""Stage `analyze`: what a folder of checkpoints holds, by tensor and by checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.generator.tokens import Checkpoints
from paw.store import Input, Stage, Watch, write_text
from paw.text import markdown_table

STATISTICS, FIGURE = "statistics.json", "drift.png"


@dataclass(kw_only=True)
class AnalyzeStage:
    pass


@dataclass(frozen=True, kw_only=True)
class AnalyzeResult:
    checkpoints: int
    tensors: int
    drift: float  # mean ‖θ_t − θ_{t−1}‖/‖θ_t‖
    between: float  # share of the squared norm that is spread around the mean checkpoint
    table: str = ""

    def __str__(self) -> str:
        return (
            f"{self.checkpoints} checkpoints of {self.tensors} tensors; a step of the trail moves "
            f"{self.drift:.1%} of the norm, {self.between:.1%} of its square is spread around the "
            "mean"
        )

    @property
    def said(self) -> str:
        return f"{self.table}\n\n{self}. By tensor: {STATISTICS}; drift: {FIGURE}."


STAGE = Stage(
    "analyze", "1", "paw.generator.analyze:analyze", config=AnalyzeStage, result=AnalyzeResult
)


def analyze(
    config: AnalyzeStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> AnalyzeResult:
    """Writes statistics.json (mean, standard deviation, smallest, largest and norm of every tensor
    over all checkpoints, and of every checkpoint over all values, with its drift from the one
    before) and drift.png.

    Args:
        inputs: `tokens`, a finished stage.
    """
    import torch

    checkpoints = Checkpoints(inputs["tokens"].path)
    layout = checkpoints.layout
    count = len(checkpoints)
    mean, spread = checkpoints.mean_and_spread(range(count))
    by_checkpoint, tensors, before = list[dict[str, Any]](), dict[str, dict[str, Any]](), None
    place = torch.from_numpy(layout.places)
    for number, checkpoint in enumerate(checkpoints.all):
        tokens = checkpoints[number]
        row: dict[str, Any] = {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            **_of(tokens[place]),
        }
        norm = max(row["norm"], 1e-12)
        row["drift"] = None if before is None else float((tokens - before).norm()) / norm
        row["from_mean"] = float((tokens - mean).norm()) / norm
        by_checkpoint.append(row)
        before = tokens
        for name, value in layout.unpack(tokens).items():
            _add(tensors.setdefault(name, {}), _of(value.float()), count)
        watch.progress(number + 1, count, "checkpoints")
    for name, value in layout.unpack(spread).items():
        tensors[name]["spread"] = float(value.float().square().mean().sqrt())
    write_text(
        out / STATISTICS, json.dumps({"checkpoints": by_checkpoint, "tensors": tensors}, indent=1)
    )
    _draw(by_checkpoint, out / FIGURE)
    drifts = [row["drift"] for row in by_checkpoint if row["drift"] is not None]
    square = float(spread.square().sum())
    return AnalyzeResult(
        checkpoints=count,
        tensors=len(tensors),
        drift=sum(drifts) / max(1, len(drifts)),
        between=square / max(square + float(mean.square().sum()), 1e-12),
        table=_table(by_checkpoint),
    )


def _of(values: Any) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "std": float(values.std(unbiased=False)),
        "min": float(values.min()),
        "max": float(values.max()),
        "norm": float(values.norm()),
    }


def _add(held: dict[str, Any], one: Mapping[str, float], count: int) -> None:
    for key in ("mean", "std", "norm"):
        held[key] = held.get(key, 0.0) + one[key] / count
    held["min"] = min(held.get("min", one["min"]), one["min"])
    held["max"] = max(held.get("max", one["max"]), one["max"])


def _table(rows: list[dict[str, Any]]) -> str:
    shown = rows if len(rows) <= 12 else [*rows[:6], *rows[-6:]]
    head = ["checkpoint", "mean", "std", "min", "max", "norm", "drift", "from the mean"]
    lines = [head]
    for row in shown:
        drift = "–" if row["drift"] is None else f"{row['drift']:.3f}"
        figures = [f"{row[k]:.2e}" for k in ("mean", "std", "min", "max")]
        lines.append(
            [row["checkpoint"], *figures, f"{row['norm']:.3f}", drift, f"{row['from_mean']:.3f}"]
        )
    return markdown_table(lines)


def _draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), constrained_layout=True)
    places = range(len(rows))
    axes.plot(places, [r["drift"] for r in rows], marker=".", label="from the one before")
    axes.plot(places, [r["from_mean"] for r in rows], marker=".", label="from the mean")
    axes.set_xlabel("checkpoint")
    axes.set_ylabel("distance / norm")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
