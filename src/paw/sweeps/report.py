"""What a sweep found: sweep.json, sweep.csv, summary.md, report.html and pictures in its folder,
and a page for the terminal. Also of a sweep that is still running."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paw.report.compare import Comparison
from paw.report.page import PAGE, data_url, rendered
from paw.report.tables import CALIBRATED
from paw.store import write_text
from paw.sweeps import figures
from paw.sweeps.best import Answer, answers
from paw.sweeps.folder import Job, Sweep, read
from paw.sweeps.systems import systems, without_transfer
from paw.sweeps.table import Cells, Row, last, numbers, rows, shown, state_of
from paw.text import WIDTH, figure, markdown_table, table_within

NAMED = 6  # methods that are named; of more their number
STATES = ("done", "running", "queued", "preempted", "failed")
# Columns that go first where a table is too wide: all are in summary.md and sweep.csv.
SPARE = (
    "seconds",
    "own",
    "base",
    "coverage",
    "jobs",
    "by likelihood",
    "calibrated",
    "transferred",
    "state",
)
KEPT = ("method", "gap recovered", "system", "accuracy")
SAYS = {1: "above", -1: "below", 0: "no significant difference"}

NOTES = (
    "Gap recovered is (transferred − base)/(own − base) on the target. Of one seed it has its "
    "95 % interval over questions in brackets; of several seeds, or draws of a placebo, it is the "
    "mean (lowest to highest). Accuracies are means over them, seconds the sum of their stages "
    "when they ran.",
    "Comparisons are paired, on the same questions: brackets are bootstrap intervals of 95 %, p "
    "is that of the exact McNemar test of accuracies (of log-likelihoods, and of means over seeds, "
    "of the paired t-test), adjusted after Holm for all comparisons of this sweep. Above and below "
    "mean that the interval excludes 0 and that this p is under .05.",
    "Intervals and p are over questions, for the seeds that were run; how far seeds differ is "
    "their range. The best was chosen by the questions that it is compared on: confirm it on "
    "others.",
)


def report(folder: Path) -> str:
    """Writes the sweep's result into its folder.

    Returns:
        The page for the terminal.

    Raises:
        ConfigError: where a folder is none of a sweep.
    """
    sweep = read(folder)
    if without_transfer(sweep):
        return _systems(sweep)
    table = rows(sweep)
    found = answers(table)
    pictures = figures.draw(folder, table)
    write_text(folder / "sweep.json", _json(sweep, table, found))
    write_text(folder / "sweep.csv", _csv(table))
    write_text(folder / "summary.md", _summary(sweep, table, found, pictures))
    said = [(_pair(a), sentences(a)) for a in found]
    notes = _notes(table) if said else []
    page = _html(sweep, [_cells(row) for row in table], said, notes, pictures)
    write_text(folder / PAGE, page)
    return _page(sweep, table, found)


def states(sweep: Sweep) -> dict[str, int]:
    """How many jobs are in each state, without those that have none."""
    found = Counter(state_of(job) for job in sweep.jobs)
    return {state: found[state] for state in STATES if found[state]}


# ---- answers in words -----------------------------------------------------------------------


def sentences(answer: Answer) -> list[str]:
    """The best method first, then what it is better than, then what limits that."""
    best = answer.best
    if best is None:
        return [*_nothing(answer), *answer.notes]
    seeds = f", {len(best.seeds)} seeds" if len(best.seeds) > 1 else ""
    return [
        f"Best: {best.name}, {answer.by} {answer.share}{seeds}{_accuracies(best)}.",
        *_base(answer),
        *_methods(answer),
        *_placebos(answer),
        *answer.notes,
    ]


def _nothing(answer: Answer) -> list[str]:
    systems = [m.system for row in answer.rows for m in row.measured]
    gaps = [gap for system in systems if (gap := system["gap"])]
    if not systems:
        return ["Nothing has been measured yet."]
    if not gaps:
        return ["Gap recovered is not known: a base or an own adapter is missing."]
    return [f"Not eligible: there is no gap to recover ({gaps[0]['reason']})."]


def _accuracies(row: Row) -> str:
    base, moved, own = row.base_accuracy, row.accuracy, row.own_accuracy
    if base is None or moved is None or own is None:
        return ""
    return f"; accuracy {base:.3f} → {moved:.3f}, own adapter {own:.3f}"


def _base(answer: Answer) -> list[str]:
    above = [row for row, c in answer.versus_base if c.verdict == 1]
    said = []
    if answer.base is not None:
        how = {1: "Above", -1: "Below", 0: "Not significantly above"}[answer.base.verdict]
        said.append(f"{how} the target base: {answer.base}.")
    if answer.versus_base and not above:
        said.append("No method is significantly above the target base.")
    elif above and answer.base is not None and answer.base.verdict != 1:
        said.append(f"Significantly above the target base: {_names(above)}.")
    return said


def _methods(answer: Answer) -> list[str]:
    said = []
    for verdict, words in (
        (1, "Significantly better than"),
        (-1, "Significantly worse, question by question, than"),
        (0, "Not significantly different from"),
    ):
        found = [a.row for a in answer.against if a.versus.verdict == verdict]
        if found:
            said.append(f"{words} {_names(found)}.")
    if answer.equal:
        said.append(f"Equal to it, question by question: {'; '.join(answer.equal)}.")
    return said


def _placebos(answer: Answer) -> list[str]:
    """Of each placebo how many draws the best one is above."""
    groups: dict[str, list[Comparison]] = {}
    for a in answer.placebos:
        groups.setdefault(a.row.short, []).append(a.versus)
    if not groups:
        return []
    above = {name: sum(c.verdict == 1 for c in found) for name, found in groups.items()}
    counts = [_of_draws(name, above[name], len(found)) for name, found in groups.items()]
    not_all = [name for name, found in groups.items() if above[name] < len(found)]
    said = [f"Placebos: above {'; '.join(counts)}."]
    if not_all:
        said.append(f"So it is not significantly above a placebo: {', '.join(not_all)}.")
    return said


def _of_draws(name: str, above: int, of: int) -> str:
    lead = f"all {of}" if above == of > 1 else f"{above} of {of}"
    return f"{lead} draw{'s' * (of > 1)} of the placebo {name}"


def _names(found: Sequence[Row]) -> str:
    names = [row.name for row in found]
    if len(names) <= NAMED:
        return "; ".join(names)
    return f"{len(names)} others: {'; '.join(names[:NAMED])} …"


# ---- the terminal's page --------------------------------------------------------------------


def _page(sweep: Sweep, table: Sequence[Row], found: Sequence[Answer]) -> str:
    parts = [_block(answer) for answer in found]
    if table:
        parts.append(_table(table, WIDTH))
    parts.append(f"{_counts(sweep)}. {sweep.folder / 'summary.md'}")
    return "\n\n".join(parts)


def _block(answer: Answer) -> str:
    lines = [
        textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        for text in sentences(answer)
    ]
    return "\n".join([_pair(answer), *lines])


def _pair(answer: Answer) -> str:
    return f"{answer.source} → {answer.target}, {answer.dataset}"


def _counts(sweep: Sweep) -> str:
    found = ", ".join(f"{n} {state}" for state, n in states(sweep).items())
    return f"{len(sweep.jobs)} job{'s' * (len(sweep.jobs) != 1)}: {found or 'none'}"


def _table(table: Sequence[Row], width: int | None = None) -> str:
    return _shown([_cells(row) for row in table], width)


def _shown(cells: Sequence[Cells], width: int | None) -> str:
    """Rows as a Markdown table. What is the same in all of them is said once, above it; of what is
    too wide, the columns that say least are left out."""
    columns = _columns(cells)
    same = [c for c in columns if len(cells) > 1 and len({row[c] for row in cells}) == 1]
    same = [c for c in same if c not in KEPT or cells[0][c] == "not eligible"]
    columns = [c for c in columns if c not in same]
    text = table_within(cells, width, SPARE, columns)
    known = [f"{c} {cells[0][c]}" for c in same]
    said = f"In all rows: {', '.join(known)}." if known else ""
    return "\n\n".join(filter(None, [textwrap.fill(said, width) if width else said, text]))


def _columns(cells: Sequence[Cells]) -> list[str]:
    """Those with figures."""
    return [c for c in cells[0] if c in KEPT or any(row[c] != "–" for row in cells)]


def _notes(table: Sequence[Row]) -> list[str]:
    """What the columns are."""
    return [*NOTES, *[CALIBRATED][: any(row.calibrated.of for row in table)]]


def _cells(row: Row) -> Cells:
    several = f", {row.draws} draws" if row.draws > 1 else ""
    return {
        "jobs": numbers(row.jobs),
        "source": row.source,
        "target": row.target,
        "dataset": row.dataset,
        **{last(key): shown(value) for key, value in row.keys.items()},
        "method": row.short + several,
        "state": row.state,
        "base": figure(row.base_accuracy, ".3f"),
        "transferred": figure(row.accuracy, ".3f"),
        "own": figure(row.own_accuracy, ".3f"),
        "gap recovered": str(row.share),
        "calibrated": str(row.calibrated),
        "by likelihood": str(row.by_likelihood),
        "coverage": figure(row.coverage, ".0%"),
        "seconds": figure(row.seconds, ".1f"),
    }


def _systems(sweep: Sweep) -> str:
    """The files and the page of a sweep that transfers nothing."""
    found = systems(sweep)
    said = {"command": sweep.command, "launcher": sweep.launcher, "jobs": states(sweep)}
    write_text(sweep.folder / "sweep.json", json.dumps({**said, "rows": found}, indent=1) + "\n")
    write_text(sweep.folder / "sweep.csv", _lines(found))
    wrong = [_failed(job) for job in sweep.jobs if state_of(job) == "failed"]
    parts = [f"# Sweep of {_counts(sweep)}", f"    {sweep.command}", _shown(found, None)]
    parts += ["## Failed jobs", *wrong] if wrong else []
    write_text(sweep.folder / "summary.md", "\n\n".join(parts) + "\n")
    write_text(sweep.folder / PAGE, _html(sweep, found))
    where = f"{_counts(sweep)}. {sweep.folder / 'summary.md'}"
    return f"{_shown(found, WIDTH)}\n\n{where}"


# ---- files ----------------------------------------------------------------------------------


def _json(sweep: Sweep, table: Sequence[Row], found: Sequence[Answer]) -> str:
    said = {
        "command": sweep.command,
        "launcher": sweep.launcher,
        "jobs": states(sweep),
        "answers": [{**a.plain(), "said": sentences(a)} for a in found],
        "rows": [row.plain() for row in table],
    }
    return json.dumps(said, indent=1) + "\n"


def _csv(table: Sequence[Row]) -> str:
    return _lines([row.plain() for row in table])


def _lines(found: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return text.getvalue()


def _summary(
    sweep: Sweep,
    table: Sequence[Row],
    found: Sequence[Answer],
    pictures: Sequence[tuple[str, str]],
) -> str:
    """Sections with nothing in them are left out."""
    said = ["\n".join([f"**{_pair(a)}**", "", *(f"- {s}" for s in sentences(a))]) for a in found]
    images = [f"![{title}]({file})\n\n{title}." for title, file in pictures]
    wrong = [_failed(job) for job in sweep.jobs if state_of(job) == "failed"]
    versus = [text for a in found if (text := _comparisons(a))]
    parts = [
        f"# Sweep of {_counts(sweep)}",
        f"    {sweep.command}",
        *said,
        _table(table) if table else "",
        *images,
        *(["## Failed jobs", *wrong] if wrong else []),
        *(["## Comparisons", *versus] if versus else []),
        "\n".join(f"- {note}" for note in _notes(table)) if table else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(
    sweep: Sweep,
    cells: Sequence[Cells],
    said: Sequence[tuple[str, list[str]]] = (),
    notes: Sequence[str] = (),
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """report.html: one file that works offline."""
    return rendered(
        "sweep.html",
        title=f"Sweep of {_counts(sweep)}",
        command=sweep.command,
        answers=said,
        columns=_columns(cells) if cells else [],
        rows=cells,
        pictures=[(title, data_url(sweep.folder / file)) for title, file in pictures],
        failed=[_failed(job) for job in sweep.jobs if state_of(job) == "failed"],
        notes=notes,
    )


def _failed(job: Job) -> str:
    error = (job.state and job.state.error) or "it does not say why"
    tail = textwrap.indent(job.tail(), "    ")
    lines = [f"**{job.number}**: `{' '.join(job.overrides)}`: {error}"]
    return "\n\n".join([*lines, *[tail][: bool(tail)], f"Its folder: {job.folder}"])


def _comparisons(answer: Answer) -> str:
    """Of those with the base that are not significant an interval was not computed."""
    if answer.best is None:
        return ""
    made = [(row.name, c) for row, c in answer.versus_base]
    made += [(answer.best.name, a.versus) for a in (*answer.against, *answer.placebos)]
    cells = [[name, c.versus, str(c.n), _versus(c), SAYS[c.verdict]] for name, c in made]
    head = ["system", "versus", "questions", "difference", "says"]
    return f"{_pair(answer)}\n\n{markdown_table([head, *cells])}" if cells else ""


def _versus(c: Comparison) -> str:
    if c.low == c.low:
        return str(c)
    return f"{c.difference:+.3f} {c.of}, p = {c.p:.2g}, {c.p_holm:.2g} after Holm"
