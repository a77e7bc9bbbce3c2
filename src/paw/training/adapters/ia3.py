"""IA³ (arXiv 2205.05638): keys, values and what enters the second feed-forward map are scaled,
element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from paw.errors import AdapterError
from paw.training.adapters import AdapterConfig, Method, Setting, targets

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class Ia3Config(AdapterConfig):
    target_modules: Optional[list[str]] = None  # else PEFT's choice for the model's type
    feedforward_modules: Optional[list[str]] = None  # those of them that are scaled at their input


def config(c: Ia3Config, setting: Setting) -> Any:
    import peft
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = setting.model.config.get_text_config().model_type
    wanted = c.target_modules or TARGETS.get(kind)
    feedforward = c.feedforward_modules or FEEDFORWARD.get(kind)
    if wanted is None or feedforward is None:
        raise AdapterError(
            f"adapter=ia3: PEFT knows no choice of modules for the type {kind!r}. Name keys, "
            "values and the second feed-forward map in adapter.target_modules, and the last of "
            "them in adapter.feedforward_modules."
        )
    if c.target_modules:
        wanted = targets(c.target_modules, setting)
    return peft.IA3Config(
        task_type=setting.task_type,
        target_modules=wanted,
        feedforward_modules=feedforward,
        modules_to_save=list(setting.head) or None,
    )


METHOD = Method(schema=Ia3Config, config=config, shards=True)
