"""task=generator_analyze: what a folder of checkpoints holds, by tensor and by checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from paw.generator.steps import Chain, Generates
from paw.launch.outline import Outline, Says


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    chain = Chain(c, c.generator.seeds[0])
    analysis = chain.analysis
    return Outline(
        label=f"analyze_{chain.base.name}",
        first=[analysis],
        comparisons=[Says(step=chain.tokens), Says(step=analysis)],
        models={"analysis": analysis},
    )
