"""task=generator_train: a generator, from prompts and adapters that are given or made."""

from __future__ import annotations

from dataclasses import dataclass

from paw.generator.steps import Generates, chains
from paw.graph import Step
from paw.launch.outline import Outline, Says


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    made = {f"generator_{chain.seed}": chain.fitted for chain in chains(c)}
    steps = {name: node for name, node in made.items() if isinstance(node, Step)}
    dry = c.generator.dry_run
    return Outline(
        label=f"generator_{c.source.name}",
        first=list(steps.values()),
        comparisons=[Says(step=step) for step in steps.values()] if dry else [],
        models={} if dry else steps,
    )
