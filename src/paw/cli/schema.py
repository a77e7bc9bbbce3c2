"""The root of the schema of every group in conf/; the yaml files only choose values.

A field marked `transient` changes how fast or where a stage runs, not what it makes: it is left out of fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from paw.config.adapters import ADAPTER_SCHEMAS, AdapterConfig
from paw.config.checks import one_of, within
from paw.config.common import HardwareConfig, PathsConfig
from paw.config.trackers import TrackerConfig
from paw.data.config import DatasetConfig
from paw.evaluation.config import EvaluateConfig
from paw.export.config import CompressConfig, MergeConfig
from paw.models.config import ModelConfig
from paw.paths import conf_dir, embedded
from paw.training.config import PreferConfig, TrainConfig
from paw.transfer.config import TRANSFER_SCHEMAS, TransferConfig

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

STAGES = (
    "encode",
    "train",
    "prefer",
    "evaluate",
    "match",
    "calibrate",
    "transfer",
    "spoil",
    "merge",
    "compress",
)


@dataclass
class GivenConfig:
    """An adapter of the target model from elsewhere: task=pipeline trains none of its own then."""

    path: Optional[str] = None


@dataclass
class PredictConfig:
    """What is asked, and where answers go."""

    text: Optional[str] = None  # one text
    file: Optional[str] = (
        None  # a line each, or .jsonl rows with the fields that dataset.prompt names; - is stdin
    )
    output: Optional[str] = None  # JSON lines, continued if it is there; else stdout
    raw: bool = False  # texts are whole prompts: dataset.prompt is not put around them
    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        within("predict.max_new_tokens", self.max_new_tokens, 1, 10**6)
        within("predict.batch_size", self.batch_size, 1, 10**6)


@dataclass
class PawConfig:
    task: str = "pipeline"
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    adapter: AdapterConfig = MISSING
    train: TrainConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    transfer: TransferConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracker: TrackerConfig = MISSING
    target_adapter: GivenConfig = field(default_factory=GivenConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    models: list[str] = field(
        default_factory=list
    )  # task=evaluate: names in conf/model, folders or hub ids
    adapters: list[str] = field(
        default_factory=list
    )  # task=evaluate: adapter folders, one pass each
    runs: list[str] = field(
        default_factory=list
    )  # task=compare: run folders, or files of records; the first is the reference
    everything: bool = False  # task=validate: every model, data set, adapter and experiment in conf/ instead of this composition
    force: list[str] = field(default_factory=list)  # stages to run again, of STAGES
    verify: bool = False  # read every artifact that is used in full; else only where its size or time has changed
    seed: int = 0
    name: Optional[str] = None  # of the run folder

    def __post_init__(self) -> None:
        tasks = sorted(p.stem for p in (conf_dir() / "task").glob("*.yaml"))
        one_of("task", self.task, tuple(tasks))
        for stage in self.force:
            one_of("force", stage, (*STAGES, "all"))


def register() -> None:
    """Tells Hydra the schemas. Safe to call twice; needed in every process that composes."""
    store = ConfigStore.instance()
    store.store(name="paw_schema", node=PawConfig)
    # In groups of their own, so that "choose from" lists only what a user can choose.
    for name, node in (("base", TransferConfig), *TRANSFER_SCHEMAS.items()):
        store.store(group="schema/transfer", name=name, node=node)
    for method, schema in ADAPTER_SCHEMAS.items():
        store.store(group="schema/adapter", name=method, node=schema)
    OmegaConf.register_new_resolver(
        "paw.lr",
        lambda mode, causal, classify: classify if mode == "classify" else causal,
        replace=True,
    )
    OmegaConf.register_new_resolver("paw.embedded", lambda name: str(embedded(name)), replace=True)
