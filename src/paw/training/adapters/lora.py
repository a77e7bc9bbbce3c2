"""LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353): W + s·BA."""

from __future__ import annotations

from typing import Any

from paw.config.adapters import LoraConfig
from paw.training.adapters import Method, Setting, targets


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


METHOD = Method(config)
