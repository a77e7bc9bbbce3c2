"""task=generator_collect: adapters for a generator to learn from, as generator.pairing says: those
of one training on its way, of a short training for each prompt, or of one for each task."""

from __future__ import annotations

from dataclasses import dataclass

from paw.generator.pairings import pairing_named
from paw.generator.steps import Chain, Generates
from paw.graph import Node
from paw.launch.outline import Outline, Says


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    chain = Chain(c, c.generator.seeds[0])
    trailed = pairing_named(c.generator.pairing).collects == "trail"
    kept: dict[str, Node] = {"trail": chain.trail} if trailed else dict(chain.branches)
    return Outline(
        label=f"collect_{chain.base.name}",
        first=[chain.groups, chain.tokens],
        comparisons=[Says(step=chain.tokens)],
        adapters={"prompts": chain.groups, **kept},
    )
