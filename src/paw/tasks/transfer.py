"""task=transfer: one adapter (adapter.path, or the source's own training) moved to the target, without evaluation."""

from __future__ import annotations

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.tasks.run_folder import Run
from paw.tasks.stages import Adapter, Stages, numbered


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> dict[str, Adapter]:
    console = Console()
    stages = Stages(config, console)
    source, target = stages.base(config.source), stages.base(config.target)
    given = stages.given_adapter(config.adapter.path, source) if config.adapter.path else None
    stages.check_mode(source, target)
    stages.find(train=given is None, transfer=True)
    if given is not None:
        stages.check_transfer(given, source, target)

    with Run(config, overrides, run_dir, stages, f"transfer_{source.name}-{target.name}") as run:
        if given is None:
            console.banner(f"train the source adapter on {source.name}")
        adapter = given or stages.train(source)
        console.banner(f"transfer it to {target.name}")
        methods = stages.methods()
        names = numbered([c.method for c in methods])
        moved = {
            name: stages.transfer(adapter, source, target, c)
            for name, c in zip(names, methods, strict=True)
        }
        run.keep("source", adapter)
        for name, result in moved.items():
            run.keep(f"target_{name.replace(' ', '_')}", result)
        run.said = [stages.feasibility(moved[names[0]])]
    return moved
