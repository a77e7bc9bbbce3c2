"""The schemas of merge, compress and push."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of, within

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class PushConfig:
    """An adapter's folder to the hub."""

    repo: Optional[str] = None  # owner/name; it is made where there is none
    private: bool = True  # of one that is made


@dataclass
class MergeConfig:
    """An adapter into its base."""

    precision: str = "auto"  # of the merged weights: auto is the base's own
    shard_gb: float = 5.0

    def __post_init__(self) -> None:
        one_of("merge.precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        within("merge.shard_gb", self.shard_gb, 0, 10**6, open_low=True)


@dataclass
class CompressConfig:
    """Post-training quantisation of a model's linear layers, by bitsandbytes."""

    scheme: str = "nf4"

    def __post_init__(self) -> None:
        one_of("compress.scheme", self.scheme, ("nf4", "int8"))
