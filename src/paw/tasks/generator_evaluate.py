"""task=generator_evaluate: what generated adapters are worth on held-out prompts, tasks and
questions, beside the mean checkpoint and everything else that needs no generator."""

from __future__ import annotations

from dataclasses import dataclass

from paw.data.kinds import kind_named
from paw.errors import ConfigError
from paw.generator.steps import Generates, chains, judged
from paw.launch.outline import Outline, Says


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    if c.generator.path:
        raise ConfigError(
            "generator.path: task=generator_evaluate scores the generator that it trains, on what "
            "was held out from it. Leave generator.path out: what was trained before is reused."
        )
    if kind_named(c.dataset.kind).written and c.evaluate.mode == "likelihood":
        raise ConfigError(
            f"task=generator_evaluate: answers of {c.dataset.name} are neither right nor wrong "
            "by likelihood. Use data with choices, or evaluate.mode=generate."
        )
    every = chains(c)
    table = judged(every)
    return Outline(
        label=f"generator_{c.source.name}",
        # adapters first, so that the base then stays in memory for all evaluations
        first=[step for chain in every for step in chain.made.values()] + [table],
        comparisons=[Says(step=table)],
        adapters={f"generated_{chain.seed}": chain.made["generated"] for chain in every},
    )
