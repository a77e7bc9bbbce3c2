"""P-tuning (arXiv 2103.10385): virtual tokens before every text, made by a small network that is
trained in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paw.config.checks import within
from paw.training.adapters import Method, Setting, VirtualTokensConfig


@dataclass
class PTuningConfig(VirtualTokensConfig):
    hidden: int = 128  # width of the network that makes the tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        within("adapter.hidden", self.hidden, 1, 10**5)


def config(c: PTuningConfig, setting: Setting) -> Any:
    import peft

    return peft.PromptEncoderConfig(
        task_type=setting.task_type,
        num_virtual_tokens=c.virtual_tokens,
        encoder_hidden_size=c.hidden,
        modules_to_save=list(setting.head) or None,
    )


METHOD = Method(schema=PTuningConfig, config=config)
