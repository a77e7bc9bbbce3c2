"""task=compress: the source model quantised after training, with accuracy before and after; an
adapter is merged first."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from paw.errors import ConfigError
from paw.evaluation.steps import Evaluates, evaluate, usable
from paw.export.config import CompressConfig, MergeConfig
from paw.export.steps import compress, merge
from paw.launch.outline import Beside, Outline, Row
from paw.models.config import ModelConfig
from paw.models.steps import base, given
from paw.training.adapters import AdapterConfig


@dataclass
class Config(Evaluates):
    source: ModelConfig = MISSING
    adapter: AdapterConfig = MISSING
    merge: MergeConfig = field(default_factory=MergeConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate.mode == "classify":
            raise ConfigError(
                "task=compress: compresses causal models. Set evaluate.mode=likelihood."
            )


def build(c: Config) -> Outline:
    source = bare = base(c, c.source)
    if c.adapter.path:
        source = merge(c, bare, given(c.adapter.path, bare), c.merge)
    small = compress(c, source, c.compress)
    before, after = (Row(evaluation=evaluate(c, m), model=m.name) for m in (source, small))
    return Outline(
        label=f"compress_{source.name}",
        first=[small.made],
        systems=[before, after],
        comparisons=[Beside(base=before, adapted=[after])],
        checks=[usable(c, bare)],
        models={"model": small.made},
    )
