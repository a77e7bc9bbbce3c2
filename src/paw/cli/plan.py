"""plan=true: one command, or all jobs of a sweep, without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from paw import plugins
from paw.config.common import RunConfig
from paw.errors import ConfigError
from paw.graph import Node, plan
from paw.launch.plan import shown
from paw.launch.run import store_of


def planned(jobs: Sequence[RunConfig]) -> str:
    """What they would run, as text.

    Raises:
        ConfigError: for a task that has no graph.
    """
    nodes: list[Node] = []
    for c in jobs:
        task = plugins.load("tasks", c.task, "task")
        if not hasattr(task, "build"):
            raise ConfigError(f"plan: task={c.task} has no steps to plan. Leave plan out.")
        nodes += task.build(c).nodes
    gpus = max(c.hardware.devices if c.hardware.device == "cuda" else 0 for c in jobs)
    return shown(plan(nodes, store_of(jobs[0])), len(jobs), gpus)
