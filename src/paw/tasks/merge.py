"""task=merge: an adapter (adapter.path) into its base, the source model, verified by logits."""

from __future__ import annotations

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.errors import ConfigError
from paw.export.merge import check_mergeable
from paw.store import Artifact
from paw.tasks.run_folder import Run
from paw.tasks.stages import Stages


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> Artifact:
    if config.adapter.path is None:
        raise ConfigError("task=merge: name the adapter: adapter.path=DIR.")
    console = Console()
    stages = Stages(config, console)
    base = stages.base(config.source)
    adapter = stages.given_adapter(config.adapter.path, base)
    check_mergeable(adapter.path)

    with Run(config, overrides, run_dir, stages, f"merge_{base.name}") as run:
        console.banner(f"merge {adapter.path} into {base.name}")
        merged = stages.merge(base, adapter)
        run.link("model", merged.path)
    return merged
