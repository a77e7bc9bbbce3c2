"""What every task has: the machine, and where things are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar

from omegaconf import MISSING, OmegaConf

from paw.config.checks import one_of, within
from paw.config.trackers import TrackerConfig
from paw.errors import ConfigError

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

C = TypeVar("C")
VERBOSITY = ("quiet", "normal", "verbose")


@dataclass
class HardwareConfig:
    """One machine: everything that differs between a laptop, a 4090 at home and a server."""

    device: str = "auto"
    precision: str = "auto"
    devices: int = 1
    nodes: int = 1  # that a training spans in a cluster's job, with so many devices each
    strategy: str = "auto"  # of training on several devices: auto is ddp
    # a DeepSpeed configuration of one's own (json); else ZeRO-2 with its optimizer in RAM
    deepspeed: Optional[str] = None
    # auto spreads a base over the profile's devices only where one device cannot hold it
    spread: str = "auto"
    # of one device: for task=validate, and for what one device can hold
    memory_gb: Optional[float] = None
    threads: Optional[int] = None
    train_batch_size: int = 4
    evaluate_batch_tokens: Optional[int] = None  # auto: by device
    models_dir: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("hardware.device", self.device, ("auto", "cpu", "cuda"))
        one_of("hardware.precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        one_of("hardware.strategy", self.strategy, ("auto", "ddp", "fsdp", "deepspeed"))
        one_of("hardware.spread", self.spread, ("auto", "never", "always"))
        within("hardware.devices", self.devices, 1, 1024)
        within("hardware.nodes", self.nodes, 1, 1024)
        if self.deepspeed is not None and self.strategy != "deepspeed":
            raise ConfigError(
                f"hardware.deepspeed: needs hardware.strategy=deepspeed, not {self.strategy}."
            )
        if self.strategy == "deepspeed" and self.device == "cpu":
            raise ConfigError(
                "hardware.strategy=deepspeed: needs GPUs. Choose ddp or fsdp, which CPUs run too."
            )


@dataclass
class PathsConfig:
    outputs: str = "outputs"
    artifacts: str = "outputs/artifacts"
    models_dir: Optional[str] = None
    data_dir: Optional[str] = None


@dataclass
class RunConfig:
    """What every task has. A task's Config adds the groups that it reads."""

    task: str = "pipeline"
    hardware: HardwareConfig = MISSING
    tracker: TrackerConfig = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    # of a sweep through Slurm: a cluster job per configuration (jobs), or per distinct step (steps)
    dispatch: str = "jobs"
    plan: bool = False  # say what would run and what it would cost, and run nothing
    force: list[str] = field(default_factory=list)  # stages to run again, or [all]
    verbosity: str = "normal"  # quiet (-q): results and warnings; verbose (-v): tracebacks, too
    verify: bool = False  # read artifacts in full, not only what changed in size or time
    seed: int = 0
    name: Optional[str] = None  # of the run folder

    def __post_init__(self) -> None:
        """Rules between groups: a part adds its own, and calls the next."""
        one_of("dispatch", self.dispatch, ("jobs", "steps"))
        one_of("verbosity", self.verbosity, VERBOSITY)


def read_as(schema: type[C], held: Mapping[str, Any]) -> C:
    """What a yaml file holds of a group, as its dataclass."""
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(held)))
    assert isinstance(made, schema)
    return made
