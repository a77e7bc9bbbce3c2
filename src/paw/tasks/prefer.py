"""task=prefer: an adapter for the source model that prefers one answer to another (DPO)."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from paw.launch.outline import Outline
from paw.models.config import ModelConfig
from paw.models.steps import base
from paw.tasks.train import refuse_given
from paw.training.steps import Prefers, prefer


@dataclass
class Config(Prefers):
    source: ModelConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_given(self)


def build(c: Config) -> Outline:
    source = base(c, c.source)
    return Outline(label=f"prefer_{source.name}", adapters={"source": prefer(c, source)})
