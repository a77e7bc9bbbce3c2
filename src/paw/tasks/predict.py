"""task=predict: answers, or classes, as JSON lines on stdout or in a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from omegaconf import MISSING

from paw.console import Console
from paw.evaluation.checks import check_asked, check_model, check_predictor
from paw.evaluation.config import PredictConfig
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.predict import Prediction, read
from paw.evaluation.steps import Evaluates
from paw.launch.check import prepare
from paw.launch.outline import Outline
from paw.launch.run import store_of
from paw.models.config import ModelConfig
from paw.models.load import resolve_runtime
from paw.models.steps import base, given
from paw.training.adapters import AdapterConfig


@dataclass
class Config(Evaluates):
    source: ModelConfig = MISSING
    adapter: AdapterConfig = MISSING
    predict: PredictConfig = field(default_factory=PredictConfig)


def run(c: Config, overrides: Sequence[str], run_dir: str | None = None) -> int:
    """Returns how many texts were answered now."""
    console, store, mode = Console(c.verbosity, sys.stderr), store_of(c), c.evaluate.mode
    check_asked(c.predict)
    asked = read(c.predict)
    source = base(c, c.source)
    adapter = given(c.adapter.path, source) if c.adapter.path else None
    nodes = [source.node, *([adapter] if adapter else [])]
    for text in prepare(c, Outline(label="predict", first=nodes), store, console):
        console.warn(text)
    check_model(mode, source.path)
    check_predictor(mode, adapter.path if adapter else None)
    model = Model(
        base=store.file(source.path),
        adapter=store.file(adapter.path) if adapter else None,
        runtime=resolve_runtime(c.hardware),
        trust_remote_code=c.source.trust_remote_code,
        engines=Engines(),
        watch=console,
    )
    prediction = Prediction(model=model, mode=mode, dataset=c.dataset, config=c.predict)
    lines = prediction.run(asked)
    console.close()
    if c.predict.output is None:
        sys.stdout.writelines(lines)  # which carries nothing else
    return len(lines)
