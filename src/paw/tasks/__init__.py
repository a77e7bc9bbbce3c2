"""What a user asks for: one file per task, with a Config that says which groups it reads, and
`build`, which makes its graph; a task that has no graph has `run` instead."""

from __future__ import annotations

from collections.abc import Sequence

from paw import plugins
from paw.config.common import RunConfig
from paw.launch.run import run


def dispatch(c: RunConfig, overrides: Sequence[str], run_dir: str | None = None) -> object:
    """Runs a task, found by its name."""
    task = plugins.load("tasks", c.task, "task")
    if hasattr(task, "run"):
        found: object = task.run(c, overrides, run_dir)
        return found
    return run(c, task.build(c), overrides, run_dir)
