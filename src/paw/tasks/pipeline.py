"""task=pipeline: six stages, wired by their artifacts."""

from __future__ import annotations

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.models.adapters import is_factors
from paw.report.results import System, judge
from paw.tasks.run_folder import Run
from paw.tasks.stages import Stages, check_adapter, numbered
from paw.transfer.transfer import fitting


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[System]:
    console = Console()
    stages = Stages(config, console)
    source, target = stages.base(config.source), stages.base(config.target)
    given = stages.given_adapter(config.adapter.path, source) if config.adapter.path else None
    there = (
        stages.given_adapter(config.target_adapter.path, target)
        if config.target_adapter.path
        else None
    )
    for model, adapter in ((source, given), (target, there)):
        if adapter is None:
            check_adapter(config, model.input.path)
    stages.find(train=given is None or there is None, evaluate=True, transfer=True)
    if there is not None and is_factors(there.path):
        fitting(
            there.path, target.input.path, "target"
        )  # not after everything else has been computed
    if given is not None:
        stages.check_transfer(given, source, target)

    with Run(config, overrides, run_dir, stages, f"{source.name}-{target.name}") as run:
        console.banner(f"[1/6] evaluate the source base, {source.name}")
        run.add(stages.evaluate("source base", source))

        console.banner("[2/6] train the source adapter and evaluate it")
        adapter = given or stages.train(source)
        run.keep("source", adapter)
        run.add(stages.evaluate("source + own adapter", source, adapter))

        console.banner(f"[3/6] transfer it to {target.name}")
        moved = [(c, stages.transfer(adapter, source, target, c)) for c in stages.methods()]
        feasible = stages.feasibility(moved[0][1])

        console.banner(f"[4/6] evaluate the target base, {target.name}")
        base = run.add(stages.evaluate("target base", target))

        console.banner("[5/6] evaluate the transferred adapter")
        transferred = []
        for name, (c, adapter) in zip(numbered([c.method for c, _ in moved]), moved, strict=True):
            run.keep(f"target_{name.replace(' ', '_')}", adapter)
            transferred.append(
                run.add(
                    stages.evaluate(
                        f"target + {name}", target, adapter, draw_of=f"target + {c.method}"
                    )
                )
            )

        console.banner("[6/6] train the target's own adapter and evaluate it")
        adapter = there or stages.train(target)
        run.keep("target_own", adapter)
        own = run.add(stages.evaluate("target + own adapter", target, adapter))

        run.said = [feasible, *judge(transferred, base, own, config.seed)]
    return run.systems
