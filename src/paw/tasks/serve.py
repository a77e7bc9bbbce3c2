"""task=serve: a page on which systems are asked side by side, and reports are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING

from paw.config.checks import within
from paw.config.common import read_as
from paw.console import Console
from paw.data.config import DatasetConfig
from paw.errors import ConfigError, need
from paw.evaluation.checks import check_model, check_predictor
from paw.evaluation.config import PredictConfig
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.steps import Evaluates
from paw.graph import Node
from paw.launch.check import prepare
from paw.launch.outline import Outline
from paw.launch.run import store_of
from paw.models.adapters import CONFIG, made_for
from paw.models.config import ModelConfig
from paw.models.load import resolve_runtime
from paw.models.steps import Base, base, given, model_named
from paw.serve import Answering, serve
from paw.tasks.evaluate import owner, short
from paw.text import first_line

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

log = logging.getLogger("paw")


@dataclass
class Config(Evaluates):
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING
    models: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    # a run's folder, for task=serve: both of its models and all of its adapters are asked
    run: Optional[str] = None
    host: str = "127.0.0.1"  # of task=serve: this machine alone; 0.0.0.0 is everybody
    port: int = 7860  # of task=serve
    predict: PredictConfig = field(default_factory=PredictConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("port", self.port, 1, 65535)


def run(c: Config, overrides: Sequence[str], run_dir: str | None = None) -> None:
    """
    Raises:
        ConfigError: Gradio is not installed, the page cannot be opened, or the run is none.
        PawError: what is wrong with a model or an adapter.
    """
    need("gradio", "serve", "task=serve")
    console = Console(c.verbosity)
    asked = Run(c, Path(c.run).expanduser()) if c.run else None
    systems = _systems(c, asked, console)
    dataset = c.dataset if asked is None else asked.dataset
    console.close()
    answering = Answering(systems, dataset, c.predict)
    try:
        page = serve(answering, Path(c.paths.outputs), c.host, c.port)
    except Exception as e:  # whatever the server or the way to it raises
        raise ConfigError(
            f"host={c.host} port={c.port}: the page cannot be opened ({first_line(e)[:200]}). "
            f"Choose another port; behind a proxy, set no_proxy={c.host}."
        ) from None
    log.info("http://%s:%s (Ctrl-C ends it)", c.host, c.port)
    page.block_thread()


def _systems(c: Config, asked: Run | None, console: Console) -> dict[str, Model]:
    """Every base, alone and with each adapter that is for it. A base is loaded when it is asked for
    the first time, and stays."""
    wanted, paths = ([], list(c.adapters)) if asked is None else (asked.models, asked.adapters)
    wanted = [*wanted, *map(model_named, c.models)] or [c.source, c.target]
    if asked is not None and c.paths.models_dir is None:
        c = replace(c, paths=replace(c.paths, models_dir=asked.models_dir))
    bases, store = [base(c, model) for model in wanted], store_of(c)

    def ready(nodes: Sequence[Node]) -> None:
        for text in prepare(c, Outline(label="serve", first=nodes), store, console):
            console.warn(text)

    ready([b.node for b in bases])
    for one in bases:
        check_model("generate", one.path)
    owners = {p: (asked and asked.owner(p, bases)) or owner(c, p, bases) for p in paths}
    found: dict[str, Model] = {}
    for one in bases:
        engines, mine = Engines(), [p for p in paths if owners[p] is one]
        nodes = {f"{one.name} + {short(p, paths)}": given(p, one) for p in mine}
        ready(list(nodes.values()))
        for name, node in {one.name: None, **nodes}.items():
            check_predictor("generate", node.path if node else None)
            found[name] = Model(
                base=store.file(one.path),
                adapter=store.file(node.path) if node else None,
                runtime=resolve_runtime(c.hardware),
                trust_remote_code=one.config.trust_remote_code,
                engines=engines,
                watch=console,
            )
    return found


class Run:
    """What a run worked with, by its config.yaml and its adapters.

    Raises:
        ConfigError: it is no folder of a run.
    """

    def __init__(self, c: Config, folder: Path) -> None:
        file = folder / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"run: {folder} is no run folder. Give one of outputs/runs.")
        self.held: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.folder = folder
        self.dataset = (
            read_as(DatasetConfig, self.held["dataset"]) if "dataset" in self.held else c.dataset
        )
        self.models_dir: str | None = self.held.get("paths", {}).get("models_dir")

    @cached_property
    def models(self) -> list[ModelConfig]:
        """Those that it named, or its source and target."""
        if named := self.held.get("models"):
            return [model_named(name) for name in named]
        found: dict[str, ModelConfig] = {}
        for place in ("source", "target"):
            if place in self.held:
                model = read_as(ModelConfig, self.held[place])
                found.setdefault(model.name, model)
        return list(found.values())

    @cached_property
    def adapters(self) -> list[str]:
        there = sorted(p.parent for p in (self.folder / "adapters").rglob(CONFIG))
        return [*map(str, there), *self.held.get("adapters", [])]

    def owner(self, path: str, bases: Sequence[Base]) -> Base | None:
        """Of an adapter from elsewhere, which does not say its base: by its folder's name."""
        if made_for(path) is not None or Path(path).parent.parent != self.folder:
            return None
        place = "source" if Path(path).name == "source" else "target"
        name = self.held.get(place, {}).get("name")
        return next((one for one in bases if one.name == name), None)
