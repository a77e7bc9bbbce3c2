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
from paw.text import markdown_table


@dataclass
class System:
    """One row: a base, alone or with an adapter, evaluated. Costs are of all stages that made it."""

    name: str
    model: str
    evaluation: Artifact
    made: list[Artifact] = field(default_factory=list)  # the stages before the evaluation: training, transfer
    coverage: float | None = None
    draw_of: str | None = None  # what it is one draw of, where chance decides
    gap: Gap | None = None
    gap_by_likelihood: Gap | None = None  # of the gold answers: more power where questions are few
    versus: list[dict[str, Any]] = field(default_factory=list)

    @property
    def group(self) -> str:
        """What several draws have in common; of a system that is none, its own name."""
        return self.draw_of or self.name

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
            "system": self.name, "draw_of": self.group, "model": self.model, **self.result,
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
        system.versus = [compare(system, base, seed)]
    if transferred and (first := transferred[0]).gap:  # where accuracy has no gap, methods are told apart by what has more power
        first.versus += [compare(first, o, seed, by_likelihood=not first.gap.eligible) for o in transferred[1:]]
    adjust([v for system in transferred for v in system.versus])
    said = [_sentence(several) for several in _draws(transferred)]
    if transferred and transferred[0].gap and not transferred[0].gap.eligible:
        said.insert(0, f"Not eligible: by {of} there is no gap to recover ({transferred[0].gap.reason}).")
        said += [f"By the gold answers' log-likelihood per token, {_recovered(several)}." for several in _draws(transferred)]
    for several in _draws(transferred[1:]):
        names = {s.name for s in several}
        said.append(_beats(transferred[0].name, [v for v in transferred[0].versus if v["versus"] in names], several))
    return said


def _draws(systems: list[System]) -> list[list[System]]:
    """Systems by what they are draws of."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.group, []).append(system)
    return list(groups.values())


def beside(base: System, adapted: list[System], seed: int = 0) -> list[str]:
    """Compares adapters with their base, and returns what may be said of each."""
    for system in adapted:
        system.versus = [compare(system, base, seed)]
    adjust([v for system in adapted for v in system.versus])
    return [_sentence([system]) for system in adapted]


def _sentence(several: list[System]) -> str:
    """What a system does to its base; of several draws, how many do it."""
    versus = [s.versus[0] for s in several]
    if len(several) == 1:
        said = {1: "a gain over", -1: "harm to", 0: "no effect shown on"}[verdict(versus[0])]
        return f"{several[0].name}: {said} {versus[0]['versus']}, {difference(versus[0])}."
    gains, harms = (sum(verdict(v) == sign for v in versus) for sign in (1, -1))
    found = f"{gains} a gain, {harms} harm, {len(versus) - gains - harms} no effect shown"
    return f"{several[0].group}, {len(several)} draws: {_range(versus)} against {versus[0]['versus']}; {found}."


def _beats(name: str, versus: list[dict[str, Any]], several: list[System]) -> str:
    if len(versus) == 1:
        verb = {1: "is above", -1: "is below", 0: "cannot be told from"}[verdict(versus[0])]
        return f"{name} {verb} {versus[0]['versus']}: {difference(versus[0])}."
    above, below = (sum(verdict(v) == sign for v in versus) for sign in (1, -1))
    lowest = min(v["low"] for v in versus)
    return (
        f"{name} is above {above} and below {below} of {len(versus)} draws of {several[0].group}: {_range(versus)}, "
        f"the lowest interval begins at {lowest:+.3f}."
    )


def _range(versus: list[dict[str, Any]]) -> str:
    low, high = (f(v["difference"] for v in versus) for f in (min, max))
    return f"{versus[0]['of']} {low:+.3f} to {high:+.3f}"


def _recovered(several: list[System]) -> str:
    gaps = [s.gap_by_likelihood for s in several]
    if not all(g and g.eligible for g in gaps):
        return f"{several[0].group} has no gap to recover"
    if len(several) == 1 and gaps[0]:
        return f"{several[0].name} recovers {gaps[0].recovered:+.2f} of the gap [{gaps[0].low:+.2f}, {gaps[0].high:+.2f}]"
    shares = [g.recovered for g in gaps if g and g.recovered is not None]
    return f"{several[0].group}, {len(several)} draws, recover {min(shares):+.2f} to {max(shares):+.2f} of the gap"


# ---- written ----------------------------------------------------------------------------------------


EXTRA = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "mcc": "MCC",
    "recall": "recall",
    "precision": "precision",
    "f1_macro": "F1 macro",
    "f1": "F1",
}


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
    rows = [_cells(several[0]) if len(several) == 1 else _folded(several) for several in _draws(systems)]
    for key, name in EXTRA.items():  # beside accuracy, where a head was asked
        if any(key in s.result for s in systems):
            head.insert(2, name)
            for row, several in zip(rows, _draws(systems), strict=True):
                value = several[0].result.get(key)
                row.insert(2, "–" if value is None else f"{value:.3f}")
    return markdown_table([head, *rows])


def _folded(several: list[System]) -> list[str]:
    """Draws of one thing in one row: means, and the range of what chance moves."""
    rows = [s.row() for s in several]
    gaps = [s.gap.recovered for s in several if s.gap and s.gap.eligible and s.gap.recovered is not None]

    def spread(values: list[float], form: str) -> str:
        return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    cells = _cells(several[0])
    cells[0] = f"{several[0].group}, {len(several)} draws"
    if rows[0]["accuracy"] is not None:
        cells[1] = spread([r["accuracy"] for r in rows], ".3f")
    cells[2], cells[3] = (f"{sum(r[key] for r in rows) / len(rows):{form}}" for key, form in (("loss", ".3f"), ("perplexity", ".3g")))
    cells[4] = f"{sum(r['seconds'] for r in rows):.1f}"
    cells[8] = spread(gaps, "+.2f") if gaps else cells[8]
    return cells


def _cells(system: System) -> list[str]:
    r, gap = system.row(), system.gap
    accuracy = "–" if r["accuracy"] is None else f"{r['accuracy']:.3f} ± {r['stderr']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
    recovered = "–" if gap is None else f"{gap.recovered:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]" if gap.eligible else "not eligible"
    states = {"reused" if a.reused else "computed" for a in [*system.made, system.evaluation]}
    return [
        system.name, accuracy, f"{r['loss']:.3f}", "–" if r["perplexity"] is None else f"{r['perplexity']:.3g}",
        f"{r['seconds']:.1f}", f"{r['ram_mib']:.0f}",
        "–" if r["gpu_mib"] is None else f"{r['gpu_mib']:.0f}", "–" if r["coverage"] is None else f"{r['coverage']:.0%}",
        recovered, states.pop() if len(states) == 1 else "partly reused",
    ]  # fmt: skip


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
        "± is one standard error, brackets are 95 % intervals; of several draws of a placebo, the mean and (lowest to highest). "
        "Loss is nats per token of the gold answers; perplexity is its exponential. "
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
