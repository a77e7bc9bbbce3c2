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

from paw.evaluation.evaluate import Record, read_records
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
    made: list[Artifact] = field(
        default_factory=list
    )  # the stages before the evaluation: training, transfer
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
        return {
            k: asdict(g) if g else None
            for k, g in (("gap", self.gap), ("gap_by_likelihood", self.gap_by_likelihood))
        }

    def row(self) -> dict[str, Any]:
        stages = [*self.made, self.evaluation]
        gpu = [a.cost["gpu_mib"] for a in stages if a.cost["gpu_mib"] is not None]
        return {
            "system": self.name,
            "draw_of": self.group,
            "model": self.model,
            **self.result,
            "seconds": sum(a.cost["seconds"] or 0 for a in stages),
            "ram_mib": max(a.cost["ram_mib"] or 0 for a in stages),
            "gpu_mib": max(gpu) if gpu else None,
            "coverage": self.coverage,
            "gap_recovered": self.gap.recovered if self.gap else None,
            "gap_low": self.gap.low if self.gap else None,
            "gap_high": self.gap.high if self.gap else None,
            "made": " ".join(f"{a.stage}:{'reused' if a.reused else 'computed'}" for a in stages),
        }


def judge(transferred: list[System], base: System, own: System, seed: int = 0) -> list[str]:
    """Fills in gaps and comparisons, and returns what the data allow to be said, a sentence a system."""
    (of, base_scores), (_, own_scores) = scores(base.records), scores(own.records)
    base_gold, own_gold = likelihoods(base.records), likelihoods(own.records)
    for system in transferred:
        system.gap = gap_recovered(base_scores, own_scores, scores(system.records)[1], of, seed)
        system.gap_by_likelihood = gap_recovered(
            base_gold, own_gold, likelihoods(system.records), "log-likelihood", seed
        )
        system.versus = [compare(system, base, seed)]
    if (
        transferred and (first := transferred[0]).gap
    ):  # where accuracy has no gap, methods are told apart by what has more power
        first.versus += [
            compare(first, o, seed, by_likelihood=not first.gap.eligible) for o in transferred[1:]
        ]
    adjust([v for system in transferred for v in system.versus])
    said = [_sentence(several) for several in _draws(transferred)]
    if transferred and transferred[0].gap and not transferred[0].gap.eligible:
        said.insert(
            0, f"Not eligible: by {of} there is no gap to recover ({transferred[0].gap.reason})."
        )
        said += [
            f"By the gold answers' log-likelihood per token, {_recovered(several)}."
            for several in _draws(transferred)
        ]
    for several in _draws(transferred[1:]):
        names = {s.name for s in several}
        said.append(
            _beats(
                transferred[0].name,
                [v for v in transferred[0].versus if v["versus"] in names],
                several,
            )
        )
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
        said = {1: "a gain over", -1: "harm to", 0: "no significant effect versus"}[
            verdict(versus[0])
        ]
        return f"{several[0].name}: {said} {versus[0]['versus']}, {difference(versus[0])}."
    gains, harms = (sum(verdict(v) == sign for v in versus) for sign in (1, -1))
    found = f"{gains} a gain, {harms} harm, {len(versus) - gains - harms} no significant effect"
    return f"{several[0].group}, {len(several)} draws: {_range(versus)} against {versus[0]['versus']}; {found}."


def _beats(name: str, versus: list[dict[str, Any]], several: list[System]) -> str:
    if len(versus) == 1:
        verb = {1: "is above", -1: "is below", 0: "is not significantly different from"}[
            verdict(versus[0])
        ]
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
    "f1": "F1",
    "f1_macro": "F1 macro",
    "precision": "precision",
    "recall": "recall",
    "mcc": "MCC",
    "pearson": "Pearson",
    "spearman": "Spearman",
}  # beside accuracy, where there are any


def table(systems: list[System]) -> str:
    """The systems as an aligned Markdown table, draws of one placebo in one row."""
    groups = _draws(systems)
    extra = {key: name for key, name in EXTRA.items() if any(key in s.result for s in systems)}
    rows = [_cells([s.row() for s in several], several, extra) for several in groups]
    return markdown_table([list(rows[0]), *(list(row.values()) for row in rows)])


def _cells(
    rows: list[dict[str, Any]], several: list[System], extra: dict[str, str]
) -> dict[str, str]:
    """A row of the table by its heads. Of several draws, means with what chance moves in brackets; peaks are the largest, and
    seconds those of all."""
    first, many = rows[0], len(rows) > 1
    accuracy = "–" if first["accuracy"] is None else _spread([r["accuracy"] for r in rows], ".3f")
    if first["accuracy"] is not None and not many:
        accuracy = f"{accuracy} ± {first['stderr']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"
    gpu = [r["gpu_mib"] for r in rows if r["gpu_mib"] is not None]
    states = {
        "reused" if a.reused else "computed" for s in several for a in [*s.made, s.evaluation]
    }
    return {
        "system": f"{several[0].group}, {len(rows)} draws" if many else several[0].name,
        "accuracy": accuracy,
        **{
            name: _spread([r[key] for r in rows], ".3f") if key in first else "–"
            for key, name in extra.items()
        },
        "loss": f"{_mean(rows, 'loss'):.3f}",
        "perplexity": "–" if first["perplexity"] is None else f"{_mean(rows, 'perplexity'):.3g}",
        "seconds": f"{sum(r['seconds'] for r in rows):.1f}",
        "RAM MiB": f"{max(r['ram_mib'] for r in rows):.0f}",
        "GPU MiB": f"{max(gpu):.0f}" if gpu else "–",
        "coverage": "–" if first["coverage"] is None else f"{first['coverage']:.0%}",
        "gap recovered": _gap(several),
        "stages": states.pop() if len(states) == 1 else "partly reused",
    }


def _gap(several: list[System]) -> str:
    gaps = [s.gap for s in several if s.gap]
    if not gaps:
        return "–"
    found = [g.recovered for g in gaps if g.eligible and g.recovered is not None]
    if not found:
        return "not eligible"
    return (
        _spread(found, "+.2f")
        if len(several) > 1
        else f"{found[0]:+.2f} [{gaps[0].low:+.2f}, {gaps[0].high:+.2f}]"
    )


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(sum(r[key] for r in rows) / len(rows))


def _spread(values: list[float], form: str) -> str:
    """One value, or the mean of several and what they range over."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def write(
    folder: Path, systems: list[System], said: list[str], about: dict[str, Any], records: list[str]
) -> None:
    """results.json, results.csv and summary.md, each whole or not at all."""
    rows = [s.row() for s in systems]
    full = []
    for row, system, file in zip(rows, systems, records, strict=True):
        stages = {a.stage: str(a.path) for a in [*system.made, system.evaluation]}
        full.append(
            row | {**system.gaps(), "versus": system.versus, "records": file, "artifacts": stages}
        )
    write_text(
        folder / "results.json",
        json.dumps(_finite(about | {"said": said, "systems": full}), indent=1, allow_nan=False)
        + "\n",
    )
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)) or ["system"]
    )
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
