"""task=serve: a page on which systems are asked side by side, and reports are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf

from paw.config.checks import within
from paw.console import Console
from paw.errors import ConfigError
from paw.evaluation.config import PredictConfig
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.steps import Evaluates
from paw.launch.check import prepare
from paw.launch.outline import Outline
from paw.launch.run import store_of
from paw.models.adapters import CONFIG
from paw.models.config import ModelConfig
from paw.models.load import resolve_runtime
from paw.models.steps import base, given, model_named
from paw.report.page import dataset_of
from paw.serve import Answering, serve
from paw.tasks.evaluate import owner, short

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


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
        ConfigError: Gradio is not installed, the port is taken, or the run is none.
    """
    if find_spec("gradio") is None:
        raise ConfigError('task=serve: needs Gradio. Install it: pip install "paw[serve]"')
    console = Console(c.verbosity)
    dataset = dataset_of(_held(c.run)["dataset"]) if c.run else c.dataset
    answering = Answering(_systems(c, console), dataset, c.predict, threading.Lock())
    console.close()
    console.say(f"http://{c.host}:{c.port} (Ctrl-C ends it)")
    try:
        serve(answering, Path(c.paths.outputs), c.host, c.port, wait=True)
    except OSError as e:
        raise ConfigError(f"port={c.port}: cannot be used ({e}). Choose another.") from None


def _systems(c: Config, console: Console) -> dict[str, Model]:
    """Every base, alone and with each adapter that is for it. A base is loaded when it is asked for
    the first time, and stays."""
    wanted, paths = _of_run(_held(c.run), Path(c.run)) if c.run else ([], list(c.adapters))
    wanted += [model_named(name) for name in c.models]
    bases = [base(c, model) for model in wanted or [c.source, c.target]]
    store = store_of(c)
    for text in prepare(c, Outline(label="serve", first=[b.node for b in bases]), store, console):
        console.warn(text)
    found: dict[str, Model] = {}
    for one in bases:
        engines, mine = Engines(), [p for p in paths if owner(c, p, bases) is one]
        nodes = {f"{one.name} + {short(p, paths)}": given(p, one) for p in mine}
        outline = Outline(label="serve", first=list(nodes.values()))
        for text in prepare(c, outline, store, console):
            console.warn(text)
        for name, node in {one.name: None, **nodes}.items():
            found[name] = Model(
                base=store.file(one.path),
                adapter=store.file(node.path) if node else None,
                runtime=resolve_runtime(c.hardware),
                trust_remote_code=one.config.trust_remote_code,
                engines=engines,
                watch=console,
            )
    return found


def _held(run: str) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        ConfigError: it is no folder of a run.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"run: {run} is no run folder. Give one of outputs/runs.")
    held: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return held


def _of_run(held: dict[str, Any], folder: Path) -> tuple[list[ModelConfig], list[str]]:
    """The models and the adapters of a run."""
    models: dict[str, ModelConfig] = {}
    for place in ("source", "target"):
        if place in held:
            schema = OmegaConf.structured(ModelConfig)
            model = OmegaConf.to_object(OmegaConf.merge(schema, held[place]))
            assert isinstance(model, ModelConfig)
            models.setdefault(model.name, model)
    there = sorted(p.parent for p in (folder / "adapters").glob(f"*/{CONFIG}"))
    return list(models.values()), [str(p) for p in there]
