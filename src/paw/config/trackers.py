"""The schema of group tracker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


SWANLAB = ("auto", "online", "offline", "local", "disabled")


@dataclass
class SwanLabConfig:
    project: str = "paw"
    workspace: Optional[str] = None  # null: that of the key
    experiment: Optional[str] = None  # null: the run folder's name
    mode: str = "auto"  # online with a key, offline without
    dir: Optional[str] = None  # null: in the run folder

    def __post_init__(self) -> None:
        one_of("tracker.swanlab.mode", self.mode, SWANLAB)


@dataclass
class WandbConfig:
    project: str = "paw"
    entity: Optional[str] = None
    experiment: Optional[str] = None
    mode: str = "auto"
    dir: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("tracker.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class TensorBoardConfig:
    dir: Optional[str] = None


@dataclass
class CsvConfig:
    file: Optional[str] = None  # null: metrics.csv in the run folder


@dataclass
class TrackerConfig:
    """Any number at once: tracker=[swanlab,tensorboard]."""

    swanlab: Optional[SwanLabConfig] = None
    wandb: Optional[WandbConfig] = None
    tensorboard: Optional[TensorBoardConfig] = None
    csv: Optional[CsvConfig] = None
