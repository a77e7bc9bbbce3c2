"""The root of every configuration: the groups that the tasks read, with the dataclasses of their
parts. The yaml files in conf/ only choose values.

A field marked `transient` changes how fast or where a stage runs, not what it makes: it is left out
of fingerprints.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from paw import plugins
from paw.config.common import RunConfig
from paw.paths import register_embedded
from paw.training.adapters import AdapterConfig
from paw.transfer.config import TransferConfig


class PluginConfigs(SearchPathPlugin):
    """Hydra finds conf/ of every plugin."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in plugins.conf_dirs()[1:]:
            search_path.append("paw.plugins", f"file://{folder}")


def config_of(task: str) -> type[RunConfig]:
    """What a task reads."""
    found: type[RunConfig] = plugins.load("tasks", task, "task").Config
    return found


def tasks_with(name: str) -> list[str]:
    """The tasks that read a key of the root."""
    reads = {task: {f.name for f in fields(config_of(task))} for task in plugins.modules("tasks")}
    return [task for task, names in reads.items() if name in names]


def root() -> type[Any]:
    """The union of what all tasks read, as one dataclass."""
    return _root(tuple(sorted(plugins.modules("tasks"))))


@cache
def _root(tasks: tuple[str, ...]) -> type[Any]:
    found: dict[str, tuple[str, Any, Any]] = {}
    for task in tasks:
        config = config_of(task)
        hints = get_type_hints(config)
        for f in fields(config):
            found.setdefault(f.name, (f.name, hints[f.name], _default(f)))
    made = make_dataclass("PawConfig", found.values())
    made.__module__ = __name__  # so that other processes are sent its name
    return made


def __getattr__(name: str) -> Any:
    if name == "PawConfig":
        return root()
    raise AttributeError(name)


def _default(f: Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return field(default_factory=f.default_factory)
    return field(default=f.default)


def stages() -> dict[str, str]:
    """All stages, each declared in the file of its name: their modules."""
    return {
        file.stem: f"{package}.{file.parent.name}.{file.stem}"
        for package, folder in plugins.packages().items()
        for file in sorted(folder.glob("*/*.py"))
        if re.search(r"^STAGE = Stage\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def register() -> None:
    """Tells Hydra the schemas. Safe to call twice; needed in every process that composes."""
    Plugins.instance()  # finds the launchers, with their schemas
    store = ConfigStore.instance()
    _register_schemas(tuple(plugins.packages().items()))
    # In the place of Hydra's own launcher, where a hardware profile chooses no other. An override
    # in conf/config.yaml would go before those of the profiles.
    here = {"_target_": "hydra_plugins.paw_launchers.Here"}
    store.store(group="hydra/launcher", name="basic", node=here, provider="paw")
    if PluginConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(PluginConfigs)
    OmegaConf.register_new_resolver("paw.lr", _lr, replace=True)
    register_embedded()


@lru_cache(maxsize=1)
def _register_schemas(packages: tuple[tuple[str, Path], ...]) -> None:
    """Those of paw and of these plugins, once in a process: it takes half a second."""
    store = ConfigStore.instance()
    store.store(name="paw_schema", node=root())
    # In groups of their own, so that "choose from" lists only what a user can choose.
    for group, part, base in (
        ("schema/transfer", "transfer/methods", TransferConfig),
        ("schema/adapter", "training/adapters", AdapterConfig),
    ):
        store.store(group=group, name="base", node=base)
        for name, module in plugins.modules(part).items():
            method = getattr(import_module(module), "METHOD", None)
            if method is not None:
                store.store(group=group, name=name, node=method.schema)


def _lr(mode: str, causal: float, classify: float) -> float:
    return classify if mode == "classify" else causal
