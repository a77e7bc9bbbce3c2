"""The schema of the adapter group: a method of PEFT each, with the learning rates that suit it.

`method` names a file in paw/training/adapters. `train.lr` is the method's own unless it is set: how large a step should be
depends far more on the method than on the data (a LoRA factor, an IA³ scale and a virtual token live on other scales).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class AdapterConfig:
    method: str = MISSING
    lr: float = transient(2e-4)  # of causal training
    lr_classify: float = transient(4e-4)  # of a classifier, whose head starts at random
    quantise: str = (
        "none"  # the base while it is trained on: none, nf4 (4 bit, double quantisation) or int8
    )
    path: Optional[str] = (
        None  # an adapter of the source model from elsewhere: it is not trained then
    )

    def __post_init__(self) -> None:
        one_of("adapter.quantise", self.quantise, ("none", "nf4", "int8"))


@dataclass
class TargetedConfig(AdapterConfig):
    """Sits on named modules."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ConfigError(
                "adapter.target_modules: the list is empty. Name modules, or [all-linear]."
            )


@dataclass
class LoraConfig(TargetedConfig):
    """LoRA (arXiv 2106.09685), and with a flag rsLoRA (arXiv 2312.03732) or DoRA (arXiv 2402.09353)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    rslora: bool = False  # scale α/√r instead of α/r
    dora: bool = False  # direction and magnitude apart

    def __post_init__(self) -> None:
        super().__post_init__()
        within("adapter.r", self.r, 1, 4096)
        within("adapter.alpha", self.alpha, 1, 65536)
        within("adapter.dropout", self.dropout, 0, 0.99)


@dataclass
class AdaLoraConfig(TargetedConfig):
    """AdaLoRA (arXiv 2303.10512): starts with `init_r` a module, ends with `r` on average, more where it matters more."""

    r: int = 8
    init_r: int = 12
    alpha: int = 32
    dropout: float = 0.1
    warmup: float = 0.1  # the share of all steps before ranks begin to fall
    settle: float = 0.3  # the share of all steps at the end, with ranks fixed
    every: int = 10  # steps between two allocations
    orthogonal: float = 0.5  # weight of the penalty on factors that are not orthogonal

    def __post_init__(self) -> None:
        super().__post_init__()
        within("adapter.r", self.r, 1, 4096)
        within("adapter.init_r", self.init_r, self.r, 4096)
        within("adapter.alpha", self.alpha, 1, 65536)
        within("adapter.dropout", self.dropout, 0, 0.99)
        within("adapter.warmup", self.warmup, 0, 1)
        within("adapter.settle", self.settle, 0, 1)
        within("adapter.every", self.every, 1, 10**6)
        within("adapter.orthogonal", self.orthogonal, 0, 10**6)
        if self.warmup + self.settle >= 1:
            raise ConfigError(
                "adapter.warmup and adapter.settle: together they leave no steps in which ranks fall. Lower one."
            )


@dataclass
class Ia3Config(AdapterConfig):
    """IA³ (arXiv 2205.05638): learnt scales of keys, values and what enters the second linear map of the feed-forward."""

    target_modules: Optional[list[str]] = None  # else PEFT's choice for the model's type
    feedforward_modules: Optional[list[str]] = None  # those of them that are scaled at their input


@dataclass
class VirtualTokensConfig(AdapterConfig):
    """Prompt tuning (arXiv 2104.08691), prefix tuning (arXiv 2101.00190) and p-tuning (arXiv 2103.10385)."""

    virtual_tokens: int = 20
    hidden: int = 128  # p-tuning: width of the network that makes the tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        within("adapter.virtual_tokens", self.virtual_tokens, 1, 10**5)
        within("adapter.hidden", self.hidden, 1, 10**5)


# By method. A method without parameters of its own takes AdapterConfig.
ADAPTER_SCHEMAS: dict[str, type[AdapterConfig]] = {
    "lora": LoraConfig,
    "adalora": AdaLoraConfig,
    "ia3": Ia3Config,
    "prompt_tuning": VirtualTokensConfig,
    "prefix_tuning": VirtualTokensConfig,
    "p_tuning": VirtualTokensConfig,
}
