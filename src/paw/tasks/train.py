"""task=train: an adapter for the source model, and its evaluation beside its base."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from paw.errors import ConfigError
from paw.evaluation.steps import evaluate
from paw.launch.outline import Beside, Outline, Row
from paw.models.config import ModelConfig
from paw.models.steps import base
from paw.training.steps import Trains, train


@dataclass
class Config(Trains):
    source: ModelConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter.path:
            raise ConfigError(
                f"adapter.path: task={self.task} does not take it. Score adapters with "
                "task=evaluate adapters=[DIR]."
            )


def build(c: Config) -> Outline:
    source = base(c, c.source)
    adapter = train(c, source)
    # a base has no head to classify with
    alone = "majority-class baseline" if c.evaluate.mode == "classify" else "source base"
    before = Row(evaluation=evaluate(c, source, name=alone), model=source.name)
    after = Row(
        evaluation=evaluate(c, source, adapter, "source + own adapter"),
        model=source.name,
        adapter=adapter,
    )
    return Outline(
        label=f"train_{source.name}",
        first=[adapter],
        systems=[before, after],
        comparisons=[Beside(base=before, adapted=[after])],
        adapters={"source": adapter},
    )
