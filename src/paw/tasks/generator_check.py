"""task=generator_check: adapters (generator.checkpoints) to tokens and back, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

from paw.errors import ConfigError
from paw.generator.steps import Chain, Generates
from paw.launch.outline import Outline, Says


@dataclass
class Config(Generates):
    pass


def build(c: Config) -> Outline:
    if not c.generator.checkpoints:
        raise ConfigError(
            "task=generator_check: name an adapter, or a folder of them: generator.checkpoints=DIR."
        )
    step = Chain(c, c.generator.seeds[0]).tokens
    return Outline(label="check_tokens", first=[step], comparisons=[Says(step=step)])
