"""dispatch=steps: one cluster job for each distinct step of a sweep, which asks for what that step
needs and runs after those that it reads; then one job without devices for each configuration, which
reports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paw.config.common import RunConfig
from paw.console import Console
from paw.graph import Execution, Step, execute, plan, sources_of, steps_of
from paw.launch.check import HARDWARE, checks_of
from paw.launch.outline import Outline, outline_of
from paw.launch.run import store_of


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """One step, in a cluster job of its own: called there."""

    overrides: Sequence[str]  # of a configuration that has the step
    config_dir: str | None
    identity: str

    def __call__(self) -> str:
        from paw.cli.compose import configs
        from paw.sweeps.signals import ends_in_good_order

        with ends_in_good_order():
            [c] = configs([self.overrides], self.config_dir)
            [step] = [
                s for s in steps_of(outline_of(c, "dispatch").nodes) if s.identity == self.identity
            ]
            console, execution = Console(c.verbosity), Execution([step], store_of(c))
            for source in sources_of([step]):
                source.get(console)
            for check in checks_of(c, Outline(label="", first=[step])):
                if check.name != HARDWARE and not check.thorough:  # it has what its step asked for
                    check.look(execution.store)
            execute(execution, console)
            return str(execution[step].result)

    def checkpoint(self) -> Any:
        """What is submitted again after a preemption: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A step that has to be made."""

    step: Step[Any]
    job: StepJob
    devices: int  # of the profile's
    of: int

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "_", f"paw_{self.step.stage.name}_{self.step.name}")[:100]


def missing(
    configs: Sequence[tuple[Sequence[str], RunConfig]], config_dir: str | None
) -> Iterator[Missing]:
    """Every distinct step that is not there yet, what is needed first."""
    owners: dict[str, tuple[Sequence[str], RunConfig]] = {}
    nodes = []
    for overrides, c in configs:
        outline = outline_of(c, "dispatch")
        nodes += outline.nodes
        for step in steps_of(outline.nodes):
            owners.setdefault(step.identity, (overrides, c))
    for planned in plan(nodes, store_of(configs[0][1])):
        if planned.state != "there":
            step = planned.step
            overrides, c = owners[step.identity]
            job = StepJob(overrides=overrides, config_dir=config_dir, identity=step.identity)
            yield Missing(step=step, job=job, devices=_devices(step, c), of=c.hardware.devices)


def _devices(step: Step[Any], c: RunConfig) -> int:
    if step.stage.devices == "none":
        return 0
    every = step.stage.devices == "all" or c.hardware.spread == "always"
    return c.hardware.devices if every else 1


def asked(params: dict[str, Any], devices: int, of: int) -> dict[str, Any]:
    """What a job asks of the scheduler for some of a profile's devices: their share of processors
    and memory; without devices, that of one."""
    share, found = max(devices, 1) / of, dict(params)
    for key in ("cpus_per_task", "mem_gb"):
        if found.get(key):
            found[key] = max(1, round(found[key] * share))
    for key in ("gpus_per_node", "gpus_per_task"):
        if found.get(key):
            found[key] = devices or None
    if found.get("gres"):
        found["gres"] = re.sub(r"(:\d+)?$", f":{devices}", found["gres"]) if devices else None
    if devices < of:
        found["nodes"] = 1
    return found
