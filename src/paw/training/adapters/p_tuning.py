"""P-tuning (arXiv 2103.10385): virtual tokens before every text, made by a small network that is trained in their place."""

from __future__ import annotations

from typing import Any

from paw.config.adapters import VirtualTokensConfig
from paw.training.adapters import Method, Setting


def config(c: VirtualTokensConfig, setting: Setting) -> Any:
    import peft

    return peft.PromptEncoderConfig(
        task_type=setting.task_type,
        num_virtual_tokens=c.virtual_tokens,
        encoder_hidden_size=c.hidden,
        modules_to_save=list(setting.head) or None,
    )


METHOD = Method(config)
