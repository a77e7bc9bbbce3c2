"""task=generator_generate: a PEFT folder for a prompt (generator.prompt), or for each of a file
(generator.input); with generator.transfer=true moved to the target as well."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from paw.errors import ConfigError
from paw.generator.config import GeneratorConfig
from paw.generator.steps import Chain, Generates
from paw.graph import Node
from paw.launch.outline import Outline, Says, adapter_folder
from paw.models.config import ModelConfig
from paw.models.steps import base
from paw.transfer.steps import Transfers, methods, real_transfer, transfer


@dataclass
class Config(Generates, Transfers):
    target: ModelConfig = MISSING
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

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
        target = base(c, c.target)
        for method in methods(c):
            moved = transfer(c, made, chain.base, target, method)
            adapters[adapter_folder(method.method)] = moved
            says.append(Says(step=real_transfer(moved)))
    return Outline(
        label=f"generate_{chain.base.name}",
        first=list(adapters.values()),
        comparisons=says[:2],
        adapters=adapters,
    )
