"""task=compare: the systems of later runs against those of the first, example by example."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paw.config.common import RunConfig
from paw.console import Console
from paw.errors import ConfigError
from paw.launch.folder import new_folder
from paw.report.compare import Comparison, adjust, compare
from paw.report.records import Recorded, paired, read_run
from paw.store import write_text
from paw.text import markdown_table

log = logging.getLogger("paw")
SAYS = {1: "above", -1: "below", 0: "no significant difference"}


@dataclass
class Config(RunConfig):
    # run folders, or files of records; the first is the reference
    runs: list[str] = field(default_factory=list)


def run(
    config: Config, overrides: Sequence[str], run_dir: str | None = None
) -> list[dict[str, Any]]:
    """Systems of the same name are compared, or all with all where no name recurs.

    Of one run alone, its later systems are compared with its first.
    """
    Console(config.verbosity)
    if not config.runs:
        raise ConfigError(
            "runs: task=compare needs what to compare: 'runs=[RUN_A,RUN_B]', "
            "run folders or files of records."
        )
    runs = [
        [Recorded(f"{s.name} [{i}]", s.records) for s in read_run(path)]
        for i, path in enumerate(config.runs, 1)
    ]
    made: list[tuple[str, str, Comparison]] = []  # system, questions that both have
    for after, before in _pairs(runs):
        a, b = paired(after, before)
        shared = f"{len(a.records)} of {len(after.records)} and {len(before.records)}"
        one = compare(a, b, seed=config.seed)
        made.append((a.name, shared, one))
        if one.of == "accuracy":
            made.append((a.name, shared, compare(a, b, seed=config.seed, by_likelihood=True)))
    if not made:
        raise ConfigError("runs: there is one system only, and nothing to compare it with.")
    kinds = {c.of for *_, c in made}
    adjusted = {of: iter(adjust([c for *_, c in made if c.of == of])) for of in kinds}
    found = [(name, shared, next(adjusted[c.of])) for name, shared, c in made]
    head = ["system", "versus", "questions", "difference", "says"]
    table = markdown_table(
        [head, *([n, c.versus, q, str(c), SAYS[c.verdict]] for n, q, c in found)]
    )
    where = "\n".join(f"- [{i}] {path}" for i, path in enumerate(config.runs, 1))
    notes = (
        "Brackets are paired bootstrap intervals of 95 %. p is that of the exact McNemar test of "
        "accuracies, and of the paired t-test of log-likelihoods (of the gold answer, per token); "
        "after Holm it is adjusted for all comparisons of one kind here."
    )
    folder = (
        Path(run_dir)
        if run_dir
        else new_folder(Path(config.paths.outputs) / "runs", config.name or "compare")
    )
    rows = [{"system": n, **c.plain(), "questions": q} for n, q, c in found]
    write_text(folder / "compare.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "summary.md", f"# compare\n\n{where}\n\n{table}\n\n{notes}\n")
    log.info("%s\n\n%s\n\n%s\n\n%s", where, table, notes, folder / "summary.md")
    return rows


def _pairs(runs: list[list[Recorded]]) -> list[tuple[Recorded, Recorded]]:
    first, later = runs[0], runs[1:]
    if not later:
        return [(system, first[0]) for system in first[1:]]
    out = []
    for systems in later:
        same = [(a, b) for a in systems for b in first if _plain(a) == _plain(b)]
        out += same or [(a, b) for a in systems for b in first]
    return out


def _plain(system: Recorded) -> str:
    return system.name.rpartition(" [")[0]
