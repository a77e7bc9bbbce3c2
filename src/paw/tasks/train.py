"""task=train: an adapter for the source model, and its evaluation beside its base."""

from __future__ import annotations

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.report.results import System, beside
from paw.tasks.run_folder import Run
from paw.tasks.stages import Stages, check_adapter


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[System]:
    console = Console()
    stages = Stages(config, console)
    base = stages.base(config.source)
    check_adapter(config, base.input.path)
    stages.find(train=True, evaluate=True)

    with Run(config, overrides, run_dir, stages, f"train_{base.name}") as run:
        console.banner(f"[1/3] train {base.name}")
        adapter = stages.train(base)
        run.keep("source", adapter)
        console.banner("[2/3] evaluate the base")
        alone = (
            "majority-class baseline" if config.evaluate.mode == "classify" else "source base"
        )  # a base has no head
        before = run.add(stages.evaluate(alone, base))
        console.banner("[3/3] evaluate the adapter")
        run.said = beside(
            before, [run.add(stages.evaluate("source + own adapter", base, adapter))], config.seed
        )
    return run.systems
