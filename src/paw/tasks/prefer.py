"""task=prefer: an adapter for the source model that prefers one answer to another (DPO)."""

from __future__ import annotations

from dataclasses import dataclass

from paw.launch.outline import Outline
from paw.models.steps import base
from paw.tasks import train as training
from paw.training.steps import Prefers, prefer


@dataclass
class Config(training.Config, Prefers):
    """What task=train reads, and the preferences."""


def build(c: Config) -> Outline:
    source = base(c, c.source)
    return Outline(label=f"prefer_{source.name}", adapters={"source": prefer(c, source)})
