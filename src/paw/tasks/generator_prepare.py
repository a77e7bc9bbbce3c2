"""task=generator_prepare: a data set's examples as prompts, train_prompts.jsonl, val_prompts.jsonl
and test_prompts.jsonl, in groups that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass

from paw.generator.steps import Chain, Generates
from paw.launch.outline import Outline


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    chain = Chain(c, c.generator.seeds[0])
    return Outline(
        label=f"prompts_{c.dataset.name}",
        first=[chain.groups],
        adapters={"prompts": chain.groups},
    )
