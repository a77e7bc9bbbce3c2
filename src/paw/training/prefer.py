"""Stage `prefer`: an adapter trained to prefer one answer to another (DPO, arXiv 2305.18290), by TRL."""

from __future__ import annotations

from dataclasses import dataclass

from paw.config.adapters import AdapterConfig
from paw.config.checks import transient
from paw.config.schema import DatasetConfig, PreferConfig, TrainConfig
from paw.models.load import Runtime
from paw.store import Stage

STAGE = Stage("prefer", "1", "paw.training.prefer:prefer")


@dataclass
class PreferStage:
    dataset: DatasetConfig
    split: str
    adapter: AdapterConfig
    train: TrainConfig
    prefer: PreferConfig
    runtime: Runtime
    base_name: str | None = transient(None)
    trust_remote_code: bool = transient(False)
