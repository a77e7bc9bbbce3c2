"""task=generator_prepare: a data set's examples as prompts, train_prompts.jsonl, val_prompts.jsonl
and test_prompts.jsonl, in groups that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paw.generator.steps import Chain, Generates
from paw.launch.outline import Outline


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    # at random: what a training has seen together, only that training knows
    g = replace(c.generator, pairing="cross") if c.generator.pairing == "order" else c.generator
    chain = Chain(replace(c, generator=g), g.seeds[0])
    return Outline(
        label=f"prompts_{c.dataset.name}",
        first=[chain.groups],
        adapters={"prompts": chain.groups},
    )
