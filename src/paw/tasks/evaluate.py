"""task=evaluate: any models, each with any adapters, on one data set."""

from __future__ import annotations

from paw.config.compose import model_named
from paw.config.schema import PawConfig
from paw.console import Console
from paw.errors import ConfigError
from paw.report.results import System
from paw.tasks.run_folder import Run
from paw.tasks.stages import Stages


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[System]:
    console = Console()
    stages = Stages(config, console)
    wanted = [model_named(name) for name in config.models] or [config.source, config.target]
    if config.adapters and len(wanted) != 1:
        raise ConfigError(f"adapters: an adapter belongs to one base; name it: models=[{wanted[0].name}].")
    bases = [stages.base(model) for model in wanted]
    adapters = {path: stages.given_adapter(path, bases[0]) for path in config.adapters}
    stages.find(evaluate=True)

    with Run(config, overrides, run_dir, stages, "evaluate_" + "+".join(b.name for b in bases)) as run:
        for base in bases:
            console.banner(f"evaluate {base.name}")
            run.add(stages.evaluate(base.name, base))
            for path, adapter in adapters.items():
                run.add(stages.evaluate(f"{base.name} + {_short(path, config.adapters)}", base, adapter))
    return run.systems


def _short(path: str, among: list[str]) -> str:
    """The folder's name, or the whole path where another has the same name."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return name if sum(other.rstrip("/").rsplit("/", 1)[-1] == name for other in among) == 1 else path
