"""plan=true: one command, or all jobs of a sweep, without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from paw.config.common import RunConfig
from paw.graph import plan
from paw.launch.outline import outline_of
from paw.launch.plan import shown
from paw.launch.run import store_of


def planned(jobs: Sequence[RunConfig]) -> str:
    """What they would run, as text.

    Raises:
        ConfigError: for a task that has no graph.
    """
    nodes = [node for c in jobs for node in outline_of(c, "plan").nodes]
    gpus = max(c.hardware.devices if c.hardware.device == "cuda" else 0 for c in jobs)
    return shown(plan(nodes, store_of(jobs[0])), len(jobs), gpus)
