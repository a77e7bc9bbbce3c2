"""task=merge: an adapter (adapter.path) into its base, the source model, verified by logits."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from paw.config.common import RunConfig
from paw.errors import ConfigError
from paw.export.config import MergeConfig
from paw.export.steps import merge
from paw.launch.outline import Outline
from paw.models.config import ModelConfig
from paw.models.steps import base, given
from paw.training.adapters import AdapterConfig


@dataclass
class Config(RunConfig):
    source: ModelConfig = MISSING
    adapter: AdapterConfig = MISSING
    merge: MergeConfig = field(default_factory=MergeConfig)


def build(c: Config) -> Outline:
    if c.adapter.path is None:
        raise ConfigError("task=merge: name the adapter: adapter.path=DIR.")
    source = base(c, c.source)
    merged = merge(c, source, given(c.adapter.path, source), c.merge)
    return Outline(label=f"merge_{source.name}", models={"model": merged.made})
