"""task=compare: the systems of later runs against those of the first, example by example."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.errors import ConfigError
from paw.report.compare import adjust, compare, difference, verdict
from paw.report.records import Recorded, paired, read_run
from paw.store import write_text
from paw.tasks.run_folder import new_folder
from paw.text import markdown_table

log = logging.getLogger("paw")


def run(
    config: PawConfig, overrides: list[str], run_dir: str | None = None
) -> list[dict[str, Any]]:
    """Systems of the same name are compared, or all with all where no name recurs. One run alone: its later systems with
    its first."""
    Console()
    if not config.runs:
        raise ConfigError(
            "runs: task=compare needs what to compare: 'runs=[RUN_A,RUN_B]', run folders or files of records."
        )
    runs = [
        [Recorded(f"{s.name} [{i}]", s.records) for s in read_run(path)]
        for i, path in enumerate(config.runs, 1)
    ]
    found: list[dict[str, Any]] = []
    for after, before in _pairs(runs):
        a, b = paired(after, before)
        shared = f"{len(a.records)} of {len(after.records)} and {len(before.records)}"
        for by_likelihood in (False, True):
            one = {
                "system": a.name,
                **compare(a, b, config.seed, by_likelihood),
                "questions": shared,
            }
            if not by_likelihood or one["of"] != found[-1]["of"]:
                found.append(one)
    if not found:
        raise ConfigError("runs: there is one system only, and nothing to compare it with.")
    for of in {one["of"] for one in found}:
        adjust([one for one in found if one["of"] == of])
    table = markdown_table(
        [["system", "versus", "questions", "difference", "says"], *(_row(one) for one in found)]
    )
    where = "\n".join(f"- [{i}] {path}" for i, path in enumerate(config.runs, 1))
    notes = (
        "Brackets are paired bootstrap intervals of 95 %. p is exact McNemar's of accuracies and the paired t-test's of "
        "log-likelihoods (of the gold answer, a token); Holm's adjustment is over all comparisons of one kind here."
    )
    folder = (
        Path(run_dir)
        if run_dir
        else new_folder(Path(config.paths.outputs) / "runs", config.name or "compare")
    )
    write_text(folder / "compare.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "summary.md", f"# compare\n\n{where}\n\n{table}\n\n{notes}\n")
    log.info("%s\n\n%s\n\n%s\n\n%s", where, table, notes, folder / "summary.md")
    return found


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


def _row(one: dict[str, Any]) -> list[str]:
    says = {1: "above", -1: "below", 0: "no significant difference"}[verdict(one)]
    return [one["system"], one["versus"], one["questions"], difference(one), says]
