"""The files of a run folder that say what was found: results.json, results.csv, summary.md."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paw.evaluation.statistics import Gap
from paw.report.claims import Claim, Recovered, comparisons_of, recovered_by
from paw.report.model import StepRow, System
from paw.report.sentences import sentences
from paw.report.tables import notes, steps_section, table
from paw.report.verdict import verdict
from paw.store import write_text

# Figures that are written also where they do not apply.
ALWAYS = ("n", "accuracy", "stderr", "low", "high", "acc_norm", "loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run found, for its folder."""

    title: str
    command: str
    about: Mapping[str, Any]  # facts by name: data set, device, seed, version
    systems: Sequence[System] = ()
    records: Sequence[str] = ()  # each system's file within the run folder (records.publish)
    claims: Sequence[Claim] = ()
    warnings: Sequence[str] = ()
    remarks: Sequence[str] = ()  # sentences of the task: why it stopped, whether it can work
    steps: Sequence[StepRow] = ()

    @cached_property
    def said(self) -> list[str]:
        """All that is said of the run, a sentence each."""
        warnings = (f"Warning: {text}" for text in self.warnings)
        return [*warnings, *self.remarks, *sentences(self.claims)]

    @cached_property
    def plain(self) -> dict[str, Any]:
        """What results.json holds."""
        systems = []
        for system, file in zip(self.systems, self.records, strict=True):
            recovered = recovered_by(system, self.claims)
            apart = recovered and recovered.calibrated
            systems.append(
                {
                    **row(system, self.claims),
                    "gap": recovered and asdict(recovered.gap),
                    "gap_by_likelihood": recovered and asdict(recovered.by_likelihood),
                    "calibrated": apart and asdict(apart),
                    "versus": [c.plain() for c in comparisons_of(system, self.claims)],
                    "records": file,
                    "artifacts": {a.stage: str(a.path) for a in system.stages},
                }
            )
        whole = {
            "title": self.title,
            "command": self.command,
            **self.about,
            "method": next((c.system.name for c in self.claims if isinstance(c, Recovered)), None),
            "said": self.said,
            "systems": systems,
            "steps": [asdict(step) for step in self.steps],
        }
        made: dict[str, Any] = _finite(whole)
        return made

    @property
    def verdict(self) -> str:
        return verdict(self.plain)


def write(folder: Path, report: Report) -> None:
    """results.json and results.csv, each whole or not at all."""
    text = json.dumps(report.plain, indent=1, allow_nan=False) + "\n"
    write_text(folder / "results.json", text)
    if report.systems:
        write_text(folder / "results.csv", _csv(report))


def summarise(folder: Path, report: Report, figures: Mapping[str, str]) -> None:
    """summary.md.

    Args:
        figures: PNG files within the folder, by their titles.
    """
    write_text(folder / "summary.md", _summary(report, figures))


def row(system: System, claims: Sequence[Claim]) -> dict[str, Any]:
    """A system's line of results.csv."""
    figures = asdict(system.result).items()
    recovered = recovered_by(system, claims)
    gap = recovered and recovered.gap
    states = (f"{a.stage}:{'reused' if a.reused else 'computed'}" for a in system.stages)
    return {
        "system": system.name,
        "draw_of": system.group,
        "model": system.model,
        **{k: v for k, v in figures if k in ALWAYS or v not in (None, {})},
        "seconds": system.seconds,
        "ram_mib": system.ram_mib,
        "gpu_mib": system.gpu_mib,
        "coverage": system.coverage,
        "gap_recovered": gap and gap.recovered,
        "gap_low": gap and gap.low,
        "gap_high": gap and gap.high,
        **(_calibrated(recovered.calibrated) if recovered and recovered.calibrated else {}),
        "made": " ".join(states),
    }


def _calibrated(gap: Gap) -> dict[str, float | None]:
    """Where all questions have the same choices."""
    ends = {"": gap.recovered, "_low": gap.low, "_high": gap.high}
    return {f"gap_calibrated{end}": value for end, value in ends.items()}


def _csv(report: Report) -> str:
    rows = [row(system, report.claims) for system in report.systems]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _summary(report: Report, figures: Mapping[str, str]) -> str:
    """The verdict, then its details. Sections with nothing in them are left out."""
    images = "\n\n".join(f"![{title}]({file})" for title, file in figures.items())
    parts = [
        f"# {report.title}",
        f"**{report.verdict}**" if report.verdict else "",
        f"    {report.command}",
        "\n".join(f"- {key}: {value}" for key, value in report.about.items()),
        table(report.systems, report.claims) if report.systems else "",
        "\n".join(f"- {text}" for text in report.said),
        notes(report.claims) if report.systems else "",
        f"## Figures\n\n{images}" if images else "",
        f"## Steps\n\n{steps_section(report.steps)}" if report.steps else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no infinities: what is unbounded becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
