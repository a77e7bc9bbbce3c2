"""task=census: the letters of the evaluation split."""

from __future__ import annotations

from dataclasses import dataclass, field

from flips.census.count import STAGE, CountStage
from paw.data.steps import split
from paw.evaluation.steps import Evaluates
from paw.graph import Step
from paw.launch.outline import Outline


@dataclass
class CensusConfig:
    letters: str = "aeiou"


@dataclass
class Config(Evaluates):
    census: CensusConfig = field(default_factory=CensusConfig)


def build(c: Config) -> Outline:
    step = Step(
        stage=STAGE,
        name=f"count {c.dataset.name}",
        config=CountStage(c.dataset, c.eval_split, c.census.letters),
        inputs={"data": split(c, c.dataset, c.eval_split)},
    )
    return Outline(label="census", first=[step])
