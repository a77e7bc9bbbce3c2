"""task=evaluate: any models, each with the adapters that are for it, on one data set."""

from __future__ import annotations

from paw.cli.compose import model_named
from paw.cli.schema import PawConfig
from paw.console import Console
from paw.errors import AdapterError, ConfigError
from paw.models.adapters import find_adapter, made_for
from paw.report.results import System, beside
from paw.tasks.run_folder import Run
from paw.tasks.stages import Adapter, Base, Stages


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[System]:
    console = Console()
    stages = Stages(config, console)
    wanted = [model_named(name) for name in config.models] or [config.source, config.target]
    bases = [stages.base(model) for model in wanted]
    adapters = {path: _placed(path, bases, stages) for path in dict.fromkeys(config.adapters)}
    stages.check_mode(*bases)
    stages.find(evaluate=True)

    with Run(
        config, overrides, run_dir, stages, "evaluate_" + "+".join(b.name for b in bases)
    ) as run:
        for base in bases:  # a base is loaded once for all of its adapters
            console.banner(f"evaluate {base.name}")
            alone = run.add(stages.evaluate(base.name, base))
            run.said += beside(
                alone,
                [
                    run.add(
                        stages.evaluate(
                            f"{base.name} + {_short(path, config.adapters)}", base, adapter
                        )
                    )
                    for path, (owner, adapter) in adapters.items()
                    if owner is base
                ],
                config.seed,
            )
    return run.systems


def _placed(path: str, bases: list[Base], stages: Stages) -> tuple[Base, Adapter]:
    """An adapter and the one of the models that it is for: as its stamp says, or the only one there is."""
    stamp = made_for(find_adapter(path))
    if stamp is None and len(bases) > 1:
        raise ConfigError(
            f"adapters: {path} does not say which base it is for; name one: models=[{bases[0].name}]."
        )
    owner = (
        bases[0]
        if len(bases) == 1
        else next((b for b in bases if b.input.fingerprint == stamp), None)
    )
    if owner is None:
        raise AdapterError(
            f"{path}: was made for none of the models ({', '.join(b.name for b in bases)}). Name its own base in models."
        )
    return owner, stages.given_adapter(path, owner)


def _short(path: str, among: list[str]) -> str:
    """The folder's name, or the whole path where another has the same name."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return (
        name if sum(other.rstrip("/").rsplit("/", 1)[-1] == name for other in among) == 1 else path
    )
