"""task=generator_generate: a PEFT folder for a prompt (generator.prompt), or for each of a file
(generator.input); with generator.transfer=true moved to the target as well."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from paw.errors import ConfigError
from paw.generator.steps import Chain, Generates
from paw.graph import Node
from paw.launch.outline import Outline, Says, adapter_folder, numbered
from paw.models.config import ModelConfig
from paw.models.steps import base
from paw.transfer.steps import Transfers, methods, real_transfer, transfer


@dataclass
class Config(Generates, Transfers):
    target: ModelConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator.transfer and self.generator.prompt is None:
            raise ConfigError(
                "generator.transfer: moves the adapter of one prompt. Give generator.prompt=TEXT."
            )


def build(c: Config) -> Outline:
    chain = Chain(c, c.generator.seeds[0])
    made = chain.asked()
    adapters: dict[str, Node] = {"generated": made}
    says = [Says(step=made)]
    if c.generator.transfer:
        target, chosen = base(c, c.target), methods(c)
        moved = [transfer(c, made, chain.base, target, method) for method in chosen]
        names = numbered([method.method for method in chosen])
        adapters |= zip(map(adapter_folder, names), moved, strict=True)
        says.append(Says(step=real_transfer(moved[0])))
    return Outline(
        label=f"generate_{chain.base.name}",
        first=list(adapters.values()),
        comparisons=says,
        adapters=adapters,
    )
