"""A sweep of a task without a gap to recover, such as task=train: a row per system that was
evaluated."""

from __future__ import annotations

from typing import Any

from paw.sweeps.folder import Job, Sweep
from paw.sweeps.table import Cells, last, shown, state_of, values, varied


def without_transfer(sweep: Sweep) -> bool:
    """Whether no job of a sweep is to say how much of a gap is recovered."""
    return all(_task(job) != "pipeline" for job in sweep.jobs)


def _task(job: Job) -> str:
    asked = [o.partition("=")[2] for o in job.overrides if o.startswith("task=")]
    return str(job.config.get("task") or (asked[-1] if asked else "pipeline"))


def systems(sweep: Sweep) -> list[Cells]:
    """Columns by name. A job that has evaluated nothing has a row with its state."""
    keys = ["model@source", "model@target", "dataset", "seed", *varied(sweep)]
    named = {"model@source": "source.name", "model@target": "target.name"}
    asked = {o.lstrip("+~").partition("=")[0] for job in sweep.jobs for o in job.overrides}
    known = {k: values(sweep, named.get(k, k), k, "default") for k in keys if k in asked}
    rows = []
    for i, job in enumerate(sweep.jobs):
        about = {"jobs": str(job.number)}
        about |= {last(key): shown(found[i]) for key, found in known.items()}
        found = job.results["systems"] if job.results else []
        for system in found or [{}]:
            rows.append({**about, **_figures(system), "state": state_of(job)})
    return rows


def _figures(system: dict[str, Any]) -> Cells:
    accuracy, low, high = (system.get(key) for key in ("accuracy", "low", "high"))
    loss, seconds = system.get("loss"), system.get("seconds")
    said = "–" if accuracy is None else f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"
    return {
        "system": system.get("system", "–"),
        "accuracy": said,
        "loss": "–" if loss is None else f"{loss:.3f}",
        "seconds": "–" if seconds is None else f"{seconds:.1f}",
    }
