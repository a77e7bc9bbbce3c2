"""LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353): W + s·BA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paw.config.checks import within
from paw.training.adapters import Method, Setting, TargetedConfig, targets


@dataclass
class LoraConfig(TargetedConfig):
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

    @property
    def transferable(self) -> bool:
        return True  # DoRA's magnitudes are folded into its factors


def config(c: LoraConfig, setting: Setting) -> Any:
    import peft

    return peft.LoraConfig(
        task_type=setting.task_type,
        r=c.r,
        lora_alpha=c.alpha,
        lora_dropout=c.dropout,
        use_rslora=c.rslora,
        use_dora=c.dora,
        target_modules=targets(c.target_modules, setting),
        modules_to_save=list(setting.head) or None,
        exclude_modules=list(setting.head) or None,
    )


METHOD = Method(schema=LoraConfig, config=config, shards=True)
