"""AdamW over an adapter's parameters, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

from paw.training.config import TrainConfig

if TYPE_CHECKING:
    import torch


def optimizer_of(
    c: TrainConfig, parameters: list[torch.nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    import torch

    if c.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=c.lr, weight_decay=c.weight_decay, fused=fused)
    optim: Any = import_module("bitsandbytes.optim")
    kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[c.optimizer]
    found: torch.optim.Optimizer = kind(parameters, lr=c.lr, weight_decay=c.weight_decay)
    return found


def learning_rate(c: TrainConfig, step: int, steps: int) -> float:
    return c.lr * scheduled(c.schedule, c.warmup_ratio, step, steps)


def scheduled(schedule: str, warmup_ratio: float, step: int, steps: int) -> float:
    """Of a step, from 0, its share of the rate: a linear warmup, then the schedule down to 0 at the
    last."""
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 - math.cos(math.pi * left))
    return {"constant": 1.0, "linear": left, "cosine": cosine}[schedule]
