"""A task's graph, run and reported."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import paw
from paw.config.common import RunConfig
from paw.console import STEP, Console
from paw.errors import PawError
from paw.evaluation.steps import Evaluates
from paw.graph import Execution, Node, Step, execute, steps_of
from paw.launch import folder as folders
from paw.launch.check import prepare
from paw.launch.outline import Beside, Comparison, Gap, Outline, Row, Says
from paw.models.load import resolve_runtime
from paw.report.claims import Claim, beside, judge
from paw.report.files import Report, summarise
from paw.report.model import StepRow, System
from paw.report.page import PAGE
from paw.report.records import file_names
from paw.store import Artifact, Store, write_text
from paw.tracking import Tracker, open_trackers

log = logging.getLogger("paw")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has ended, in Python."""

    folder: Path
    outline: Outline
    report: Report
    execution: Execution

    @property
    def systems(self) -> Sequence[System]:
        return self.report.systems

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of the adapters, and of merged or compressed models, in the store."""
        named = {**self.outline.adapters, **self.outline.models}
        return {name: self.execution.path(node) for name, node in named.items()}


def store_of(c: RunConfig) -> Store:
    return Store(Path(c.paths.artifacts), c.force, c.verify)


def run(c: RunConfig, outline: Outline, overrides: Sequence[str], run_dir: str | None) -> Finished:
    """Checks, runs and reports a graph. There is no run folder before everything is found; and
    whatever happens then, what was made until then is in it.

    Raises:
        PawError: the first thing that is wrong, or the first step that failed.
    """
    began, console, store = time.monotonic(), Console(c.verbosity), store_of(c)
    warnings = prepare(c, outline, store, console)
    for text in warnings:
        console.warn(text)
    root = Path(c.paths.outputs) / "runs"
    folder = Path(run_dir) if run_dir else folders.new_folder(root, c.name or outline.label)
    settings = asdict(c)
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    console.keep(folder / "run.log")
    console.tracker = open_trackers(c.tracker, folder, settings)
    title = f"{c.task}: {outline.label}"
    about = _about(c)
    machine = f"{about['dataset']} on {about['device']}"
    log.log(STEP, "paw %s  %s  %s  %s", paw.__version__, title, machine, folder)

    execution = Execution(outline.nodes, store)
    found = partial(_report, c, outline, execution, warnings, title, overrides)
    try:
        execute(execution, console)
    except BaseException as e:
        console.close()
        if e not in execution.failed.values():  # those have been told
            console.note_failure(e)
        if isinstance(e, PawError) and run_dir is None and not _worth(outline, execution):
            # nothing was made: the one line that says why is all there is
            shutil.rmtree(folder, ignore_errors=True)
        else:
            report = found(f"Unfinished: {str(e) or type(e).__name__}")
            _fill(c, folder, report, outline, execution, console.tracker)
        raise
    else:
        console.close()
        report = found(None)
        kept = _fill(c, folder, report, outline, execution, console.tracker)
        whole = c.verbosity == "verbose"
        seconds = time.monotonic() - began
        folders.tell(folder, report, seconds=seconds, kept=kept, whole=whole)
        return Finished(folder=folder, outline=outline, report=report, execution=execution)
    finally:
        if console.tracker is not None:
            console.tracker.finish()


def results(c: RunConfig, *steps: Step[Any]) -> list[Any]:
    """The typed results of steps, run if they were not yet, without a run folder: for notebooks.

    Raises:
        PawError: the first thing that is wrong, or the first step that failed.
    """
    console, store = Console(c.verbosity), store_of(c)
    for text in prepare(c, Outline(label="", first=steps), store, console):
        console.warn(text)
    execution = Execution(steps, store)
    execute(execution, console)
    return [execution[step].result for step in steps]


def _worth(outline: Outline, execution: Execution) -> bool:
    kept: list[Node] = [row.evaluation for row in outline.systems]
    kept += [*outline.adapters.values(), *outline.models.values()]
    return any(isinstance(n, Step) and n in execution for n in kept)


# ---- what is reported -----------------------------------------------------------------------


def _fill(
    c: RunConfig,
    folder: Path,
    report: Report,
    outline: Outline,
    execution: Execution,
    tracker: Tracker | None,
) -> list[str]:
    """Writes the run folder, and returns what is in it beside the report."""
    adapters = {k: execution.path(n) for k, n in outline.adapters.items() if n in execution}
    models = {k: execution.path(n) for k, n in outline.models.items() if n in execution}
    folders.fill(folder, report, form=_form(c), adapters=adapters, models=models)
    there = [row for row in outline.systems if row.evaluation in execution]
    by = dict(zip(dict.fromkeys(row.key for row in there), report.systems, strict=True))
    for name in adapters:
        node = outline.adapters[name]
        folders.card(folder, name, report, [by[r.key] for r in there if r.adapter is node])
    figures = folders.draw(folder, Path(c.paths.artifacts))
    summarise(folder, report, figures or {})
    page = [] if figures is None else [PAGE]
    if tracker is not None:
        tracker.keep(folders.left(folder, figures or {}))
    return [*page, *["adapters"][: len(adapters)], *models]


def _form(c: RunConfig) -> str:
    return c.evaluate.records if isinstance(c, Evaluates) else "jsonl"


def _about(c: RunConfig) -> dict[str, Any]:
    runtime = resolve_runtime(c.hardware)
    data = f"{c.dataset.name}, split {c.eval_split}" if isinstance(c, Evaluates) else "no data set"
    device = f"{runtime.device}, {runtime.precision}"
    return {"dataset": data, "device": device, "seed": c.seed, "paw": paw.__version__}


def _report(
    c: RunConfig,
    outline: Outline,
    execution: Execution,
    warnings: Sequence[str],
    title: str,
    overrides: Sequence[str],
    stopped: str | None,
) -> Report:
    there = [row for row in outline.systems if row.evaluation in execution]
    systems = {row.key: _system(row, execution) for row in there}
    claims: list[Claim] = []
    remarks = [stopped] if stopped else []
    for comparison in outline.comparisons:
        if isinstance(comparison, Says):
            if comparison.step in execution:
                remarks.append(execution[comparison.step].result.said)
        else:
            claims += _claims(comparison, systems, c.seed)
    return Report(
        title=title,
        command=shlex.join(["python", "-m", "paw.run", *overrides]),
        about=_about(c),
        systems=list(systems.values()),
        records=file_names(list(systems.values()), _form(c)),
        claims=claims,
        warnings=warnings,
        remarks=remarks,
        steps=[_step(step, execution) for step in execution.steps],
    )


def _claims(
    comparison: Comparison, systems: dict[tuple[str, str], System], seed: int
) -> list[Claim]:
    """What may be said with the systems that are there."""

    def there(rows: Sequence[Row]) -> list[System]:
        found = (systems.get(row.key) for row in rows)
        return [system for system in found if system is not None]

    if isinstance(comparison, Gap):
        base, own = there([comparison.base]), there([comparison.own])
        if base and own:
            return judge(there(comparison.transferred), base=base[0], own=own[0], seed=seed)
    if isinstance(comparison, Beside) and (base := there([comparison.base])):
        return beside(base[0], there(comparison.adapted), seed=seed)
    return []


def _system(row: Row, execution: Execution) -> System:
    made: list[Artifact[Any]] = []
    if row.adapter is not None:
        made = [execution[step] for step in steps_of([row.adapter])]
    coverages = [a.result.coverage for a in made if hasattr(a.result, "coverage")]
    return System(
        name=row.name,
        model=row.model,
        evaluation=execution[row.evaluation],
        made=made,
        coverage=coverages[-1] if coverages else None,
        draw_of=row.draw_of,
    )


def _step(step: Step[Any], execution: Execution) -> StepRow:
    needs = [node.name for node in step.needs if isinstance(node, Step)]
    if step in execution:
        made = execution[step]
        return StepRow(
            name=step.name,
            stage=step.stage.name,
            state="reused" if made.reused else "computed",
            seconds=made.cost["seconds"],
            ram_mib=made.cost["ram_mib"],
            gpu_mib=made.cost["gpu_mib"],
            cpu_percent=made.cost.get("cpu_percent"),  # artifacts of before have none
            gpu_percent=made.cost.get("gpu_percent"),
            needs=needs,
            artifact=f"{made.stage}/{made.path.name}",
            text=str(made.result),
        )
    error = execution.failed.get(step.identity)
    why = "what it needs failed" if step.identity in execution.left_out else "not reached"
    return StepRow(
        name=step.name,
        stage=step.stage.name,
        state="failed" if error else "left out",
        needs=needs,
        text=str(error) or type(error).__name__ if error else why,
    )
