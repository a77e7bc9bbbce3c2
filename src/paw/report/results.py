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

from paw.evaluation.stage import Record, read_records
from paw.evaluation.statistics import Gap, gap_recovered
from paw.report.compare import adjust, compare, difference, likelihoods, scores, verdict
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
    def records(self) -> list[Record]:
        """A record a question, read once however many systems this one is compared with."""
        return read_records(self.evaluation.path)

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


def judge(transferred: list[System], base: System, own: System, seed: int = 0) -> list[str]:
    """Fills in gaps and comparisons, and returns what the data allow to be said, a sentence a system."""
    (of, base_scores), (_, own_scores) = scores(base.records), scores(own.records)
    base_gold, own_gold = likelihoods(base.records), likelihoods(own.records)
    for system in transferred:
        system.gap = gap_recovered(base_scores, own_scores, scores(system.records)[1], of, seed)
        system.gap_by_likelihood = gap_recovered(base_gold, own_gold, likelihoods(system.records), "log-likelihood", seed)
        system.versus = [compare(system, base, seed)] + [compare(system, o, seed) for o in transferred[1:] if system is transferred[0]]
    adjust([v for system in transferred for v in system.versus])
    said = [_sentence(system) for system in transferred]
    if transferred and transferred[0].gap and not transferred[0].gap.eligible:
        said.insert(0, f"Not eligible: by {of} there is no gap to recover ({transferred[0].gap.reason}).")
        said += [f"By the gold answers' log-likelihood per token, {s.name} {_recovered(s.gap_by_likelihood)}." for s in transferred]
    for versus in transferred[0].versus[1:] if transferred else []:
        verb = {1: "is above", -1: "is below", 0: "cannot be told from"}[verdict(versus)]
        said.append(f"{transferred[0].name} {verb} {versus['versus']}: {difference(versus)}.")
    return said


def beside(base: System, adapted: list[System], seed: int = 0) -> list[str]:
    """Compares adapters with their base, and returns what may be said of each."""
    for system in adapted:
        system.versus = [compare(system, base, seed)]
    adjust([v for system in adapted for v in system.versus])
    return [_sentence(system) for system in adapted]


def _sentence(system: System) -> str:
    versus = system.versus[0]
    said = {1: "a gain over", -1: "harm to", 0: "no effect shown on"}[verdict(versus)]
    return f"{system.name}: {said} {versus['versus']}, {difference(versus)}."


def _recovered(gap: Gap | None) -> str:
    if gap is None or not gap.eligible:
        return "has no gap to recover"
    return f"recovers {gap.recovered:+.2f} of the gap [{gap.low:+.2f}, {gap.high:+.2f}]"


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
    accuracy = "–" if r["accuracy"] is None else f"{r['accuracy']:.3f} ± {r['stderr']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
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


def write(folder: Path, systems: list[System], said: list[str], about: dict[str, Any], records: list[str]) -> None:
    """results.json, results.csv and summary.md, each whole or not at all."""
    rows = [s.row() for s in systems]
    full = []
    for row, system, file in zip(rows, systems, records, strict=True):
        stages = {a.stage: str(a.path) for a in [*system.made, system.evaluation]}
        full.append(row | {**system.gaps(), "versus": system.versus, "records": file, "artifacts": stages})
    write_text(folder / "results.json", json.dumps(_finite(about | {"said": said, "systems": full}), indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)) or ["system"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())
    facts = "\n".join(f"- {k}: {v}" for k, v in about.items() if k != "command")
    lines = "\n".join(f"- {s}" for s in said)
    notes = (
        "± is one standard error, brackets are 95 % intervals. Loss is nats per token of the gold answers; perplexity is its exponential. "
        "Gap recovered is (transferred − base)/(own − base) with a paired bootstrap interval. "
        "p is exact McNemar's (of likelihoods, the paired t-test's) and, adjusted for all comparisons made here, Holm's. "
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
