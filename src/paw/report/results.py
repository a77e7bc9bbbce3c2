"""The systems of a run side by side: numbers, their errors, what they cost, and what the data allow to be said."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paw.evaluation.stage import read_records
from paw.evaluation.statistics import Gap, Vector, gap_recovered, mcnemar, resampled_means
from paw.store import Artifact, write_text


@dataclass
class System:
    """One row: a base, alone or with an adapter, evaluated. Costs are of all stages that made it."""

    name: str
    model: str
    evaluation: Artifact
    made: list[Artifact] = field(default_factory=list)  # the stages before the evaluation: training, transfer
    coverage: float | None = None
    gap: Gap | None = None
    gap_by_likelihood: Gap | None = None  # of the gold answers: more power where questions are few
    versus: list[dict[str, Any]] = field(default_factory=list)

    @property
    def result(self) -> dict[str, Any]:
        return self.evaluation.result

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """A record a question, read once however many systems this one is compared with."""
        return read_records(self.evaluation.path)

    def scores(self) -> tuple[str, Vector]:
        """Per question: right or wrong; or, without alternatives, the gold answer's log-likelihood per token."""
        if self.result["accuracy"] is None:
            return "log-likelihood", self.likelihoods()
        return "accuracy", np.array([float(r["prediction"] == r["gold"]) for r in self.records])

    def likelihoods(self) -> Vector:
        """The gold answer's log-likelihood per token (nats), per question."""
        return np.array([r["loglikelihoods"][r["gold"]] / r["tokens"][r["gold"]] for r in self.records])

    def gaps(self) -> dict[str, Any]:
        return {k: asdict(g) if g else None for k, g in (("gap", self.gap), ("gap_by_likelihood", self.gap_by_likelihood))}

    def row(self) -> dict[str, Any]:
        stages = [*self.made, self.evaluation]
        gpu = [a.cost["gpu_mib"] for a in stages if a.cost["gpu_mib"] is not None]
        return {
            "system": self.name, "model": self.model, **self.result,
            "seconds": sum(a.cost["seconds"] or 0 for a in stages), "ram_mib": max(a.cost["ram_mib"] or 0 for a in stages),
            "gpu_mib": max(gpu) if gpu else None, "coverage": self.coverage,
            "gap_recovered": self.gap.recovered if self.gap else None,
            "gap_low": self.gap.low if self.gap else None, "gap_high": self.gap.high if self.gap else None,
            "made": " ".join(f"{a.stage}:{'reused' if a.reused else 'computed'}" for a in stages),
        }  # fmt: skip


def compare(after: System, before: System, seed: int = 0) -> dict[str, Any]:
    """Two systems on the same questions: mean difference, its paired bootstrap interval, flips and exact McNemar."""
    (of, a), (_, b) = after.scores(), before.scores()
    low, high = np.percentile(resampled_means((a - b)[:, None], seed)[:, 0], [2.5, 97.5])
    out: dict[str, Any] = {
        "versus": before.name,
        "of": of,
        "difference": float((a - b).mean()),
        "low": float(low),
        "high": float(high),
    }
    if of == "accuracy":
        out["gained"], out["lost"], out["p"] = mcnemar(b, a)
    return out


def judge(transferred: list[System], base: System, own: System, seed: int = 0) -> list[str]:
    """Fills in gaps and comparisons, and returns what the data allow to be said, a sentence a system."""
    (of, base_scores), (_, own_scores) = base.scores(), own.scores()
    for system in transferred:
        system.gap = gap_recovered(base_scores, own_scores, system.scores()[1], of, seed)
        system.gap_by_likelihood = gap_recovered(base.likelihoods(), own.likelihoods(), system.likelihoods(), "log-likelihood", seed)
        system.versus = [compare(system, base, seed)] + [compare(system, o, seed) for o in transferred[1:] if system is transferred[0]]
    said = [_sentence(system) for system in transferred]
    if transferred and transferred[0].gap and not transferred[0].gap.eligible:
        said.insert(0, f"Not eligible: by {of} there is no gap to recover ({transferred[0].gap.reason}).")
        said += [f"By the gold answers' log-likelihood per token, {s.name} {_recovered(s.gap_by_likelihood)}." for s in transferred]
    for versus in transferred[0].versus[1:] if transferred else []:
        verb = "is above" if versus["low"] > 0 else "is below" if versus["high"] < 0 else "cannot be told from"
        said.append(f"{transferred[0].name} {verb} {versus['versus']}: {_difference(versus)}.")
    return said


def _sentence(system: System) -> str:
    versus = system.versus[0]
    if versus["low"] > 0:
        verdict = "a gain over the target's base"
    elif versus["high"] < 0:
        verdict = "harm to the target's base"
    else:
        verdict = "no effect shown on the target's base"
    return f"{system.name}: {verdict}, {_difference(versus)}."


def _recovered(gap: Gap | None) -> str:
    if gap is None or not gap.eligible:
        return "has no gap to recover"
    return f"recovers {gap.recovered:+.2f} of the gap [{gap.low:+.2f}, {gap.high:+.2f}]"


def _difference(versus: dict[str, Any]) -> str:
    text = f"{versus['difference']:+.3f} {versus['of']} [{versus['low']:+.3f}, {versus['high']:+.3f}]"
    return text + (f", {versus['gained']} gained, {versus['lost']} lost, McNemar p = {versus['p']:.2g}" if "p" in versus else "")


# ---- written ----------------------------------------------------------------------------------------


def table(systems: list[System]) -> str:
    """The systems as an aligned Markdown table."""
    head = [
        "system",
        "accuracy",
        "loss",
        "perplexity",
        "seconds",
        "RAM MiB",
        "GPU MiB",
        "coverage",
        "gap recovered",
        "stages",
    ]
    return aligned([head, *(_cells(s) for s in systems)])


def _cells(system: System) -> list[str]:
    r, gap = system.row(), system.gap
    accuracy = "–" if r["accuracy"] is None else f"{r['accuracy']:.3f} ± {r['stderr']:.3f}"
    recovered = "–" if gap is None else f"{gap.recovered:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]" if gap.eligible else "not eligible"
    states = {"reused" if a.reused else "computed" for a in [*system.made, system.evaluation]}
    return [
        system.name, accuracy, f"{r['loss']:.3f}", f"{r['perplexity']:.3g}", f"{r['seconds']:.1f}", f"{r['ram_mib']:.0f}",
        "–" if r["gpu_mib"] is None else f"{r['gpu_mib']:.0f}", "–" if r["coverage"] is None else f"{r['coverage']:.0%}",
        recovered, states.pop() if len(states) == 1 else "partly reused",
    ]  # fmt: skip


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write(folder: Path, systems: list[System], said: list[str], about: dict[str, Any]) -> None:
    """results.json, results.csv and summary.md, each whole or not at all."""
    rows = [s.row() for s in systems]
    full = []
    for row, system in zip(rows, systems, strict=True):
        stages = {a.stage: str(a.path) for a in [*system.made, system.evaluation]}
        full.append(row | {**system.gaps(), "versus": system.versus, "artifacts": stages})
    write_text(folder / "results.json", json.dumps(_finite(about | {"said": said, "systems": full}), indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["system"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())
    facts = "\n".join(f"- {k}: {v}" for k, v in about.items() if k != "command")
    lines = "\n".join(f"- {s}" for s in said)
    notes = (
        "± is one standard error. Loss is nats per token of the gold answers; perplexity is its exponential. "
        "Gap recovered is (transferred − base)/(own − base) with a paired bootstrap interval of 95 %. "
        "Seconds are those of the stages when they ran."
    )
    write_text(
        folder / "summary.md",
        f"# {about['title']}\n\n    {about['command']}\n\n{facts}\n\n{table(systems)}\n\n{lines}\n\n{notes}\n",
    )


def _finite(value: Any) -> Any:
    """JSON has no infinities: what is unbounded becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
