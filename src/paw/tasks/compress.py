"""task=compress: the source model quantised after training, with accuracy before and after; an adapter is merged first."""

from __future__ import annotations

from dataclasses import replace

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.errors import ConfigError, need
from paw.export.merge import check_mergeable
from paw.report.results import System, beside
from paw.tasks.run_folder import Run
from paw.tasks.stages import Base, Stages


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[System]:
    need("bitsandbytes", "quantise", "task=compress")
    if config.evaluate.mode == "classify":
        raise ConfigError("task=compress: compresses causal models. Set evaluate.mode=likelihood.")
    console = Console()
    stages = Stages(config, console)
    base = stages.base(config.source)
    stages.check_mode(base)
    adapter = stages.given_adapter(config.adapter.path, base) if config.adapter.path else None
    if adapter is not None:
        check_mergeable(adapter.path)
    stages.find(evaluate=True)

    with Run(config, overrides, run_dir, stages, f"compress_{base.name}") as run:
        if adapter is not None:
            console.banner(f"merge {adapter.path} into {base.name}")
            merged = stages.merge(base, adapter)
            base = Base(
                replace(base.config, name=f"{base.name}_merged", hub=None), merged.as_input()
            )
        console.banner(f"compress {base.name} to {config.compress.scheme}")
        small = stages.compress(base)
        run.link("model", small.path)
        console.banner("evaluate before and after")
        before = run.add(stages.evaluate(base.name, base))
        name = f"{base.name}, {config.compress.scheme}"
        after = run.add(
            stages.evaluate(name, Base(replace(base.config, name=name, hub=None), small.as_input()))
        )
        run.said = beside(before, [after], config.seed)
    return run.systems
