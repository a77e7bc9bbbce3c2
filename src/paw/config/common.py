"""What every task has: the machine, and where things are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of, within
from paw.errors import ConfigError

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class HardwareConfig:
    """One machine: everything that differs between a laptop, a 4090 at home and a server."""

    device: str = "auto"
    precision: str = "auto"
    devices: int = 1
    strategy: str = "auto"  # of training on several devices: auto is ddp
    deepspeed: Optional[str] = (
        None  # a DeepSpeed configuration of one's own (json); else ZeRO-2 with its optimizer in RAM
    )
    memory_gb: Optional[float] = None  # of one device, for task=validate
    threads: Optional[int] = None
    train_batch_size: int = 4
    evaluate_batch_tokens: Optional[int] = None  # auto: by device
    models_dir: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("hardware.device", self.device, ("auto", "cpu", "cuda"))
        one_of("hardware.precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        one_of("hardware.strategy", self.strategy, ("auto", "ddp", "fsdp", "deepspeed"))
        within("hardware.devices", self.devices, 1, 1024)
        if self.deepspeed is not None and self.strategy != "deepspeed":
            raise ConfigError(
                f"hardware.deepspeed: needs hardware.strategy=deepspeed, not {self.strategy}."
            )
        if self.strategy == "deepspeed" and self.device == "cpu":
            raise ConfigError(
                "hardware.strategy=deepspeed: needs GPUs. Choose ddp or fsdp, which also run on CPUs."
            )


@dataclass
class PathsConfig:
    outputs: str = "outputs"
    artifacts: str = "outputs/artifacts"
    models_dir: Optional[str] = None
    data_dir: Optional[str] = None
