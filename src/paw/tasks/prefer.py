"""task=prefer: an adapter for the source model that prefers one answer to another (DPO)."""

from __future__ import annotations

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.tasks.run_folder import Run
from paw.tasks.stages import Adapter, Stages, check_adapter
from paw.training import prefer


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> Adapter:
    prefer.check(config.hardware.devices)
    console = Console()
    stages = Stages(config, console)
    base = stages.base(config.source)
    check_adapter(config, base.input.path)
    stages.find(train=True)

    with Run(config, overrides, run_dir, stages, f"prefer_{base.name}") as run:
        console.banner(f"prefer {base.name}")
        adapter = stages.prefer(base)
        run.keep("source", adapter)
    return adapter
