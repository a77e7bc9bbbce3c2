"""LoRA of rank 1 on whatever modules PEFT chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paw.training.adapters import AdapterConfig, Method, Setting


@dataclass
class NarrowConfig(AdapterConfig):
    alpha: int = 2

    @property
    def transferable(self) -> bool:
        return True


def config(c: NarrowConfig, setting: Setting) -> Any:
    import peft

    return peft.LoraConfig(task_type=setting.task_type, r=1, lora_alpha=c.alpha)


METHOD = Method(schema=NarrowConfig, config=config)
