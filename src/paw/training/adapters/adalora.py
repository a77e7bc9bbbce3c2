"""AdaLoRA (arXiv 2303.10512): ΔW = P Λ Q, singular values pruned where a triplet's sensitivity is
low.

PEFT leaves two things to whoever trains: the allocation after every optimiser step, without which
it is plain LoRA, and the penalty ‖PᵀP − I‖ + ‖QQᵀ − I‖ (equation 4), which it adds only to a loss
that it computes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paw.config.checks import within
from paw.errors import ConfigError
from paw.training.adapters import Method, Setting, TargetedConfig, targets

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass
class AdaLoraConfig(TargetedConfig):
    """Starts with `init_r` a module, ends with `r` on average, more where it matters more."""

    r: int = 8
    init_r: int = 12
    alpha: int = 32
    dropout: float = 0.1
    warmup: float = 0.1  # the share of all steps before ranks begin to fall
    settle: float = 0.3  # the share of all steps at the end, with ranks fixed
    every: int = 10  # steps between two allocations
    orthogonal: float = 0.5  # weight of the penalty on factors that are not orthogonal

    @property
    def transferable(self) -> bool:
        return True

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
                "adapter.warmup and adapter.settle: together they leave no steps in which ranks "
                "fall. Lower one."
            )


def config(c: AdaLoraConfig, setting: Setting) -> Any:
    import peft

    first, last = round(c.warmup * setting.steps), round(c.settle * setting.steps)
    left = setting.steps - first - last
    if left < c.every:
        raise ConfigError(
            f"adapter=adalora: of {setting.steps} steps, {left} are left for ranks to fall, fewer "
            f"than adapter.every={c.every}. Train longer, or lower adapter.every."
        )
    return peft.AdaLoraConfig(
        task_type=setting.task_type,
        init_r=c.init_r,
        target_r=c.r,
        lora_alpha=c.alpha,
        lora_dropout=c.dropout,
        tinit=first,
        tfinal=last,
        deltaT=c.every,
        total_step=setting.steps,
        orth_reg_weight=c.orthogonal,
        target_modules=targets(c.target_modules, setting),
        modules_to_save=list(setting.head) or None,
        exclude_modules=list(setting.head) or None,
    )


def after_step(model: Any, step: int) -> None:
    device = next(model.parameters()).device
    # read from a checkpoint they are where that was read, and the model moved on
    for name in AVERAGES:
        averages = getattr(model.base_model.rankallocator, name)
        averages.update({k: v.to(device) for k, v in averages.items() if v.device != device})
    model.base_model.update_and_allocate(step)


def penalty(model: Any) -> Any:
    """The mean Frobenius norm over all factors, weighed as the configuration says (PEFT's form of
    equation 4)."""
    import torch

    weight = model.peft_config["default"].orth_reg_weight
    found = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            eye = torch.eye(len(gram), device=p.device, dtype=p.dtype)
            found.append(torch.linalg.matrix_norm(gram - eye))
    return weight * torch.stack(found).mean()


def state(model: Any) -> Mapping[str, Any]:
    averages = {name: getattr(model.base_model.rankallocator, name) for name in AVERAGES}
    return averages | {"rank_pattern": model.peft_config["default"].rank_pattern}


def restore(model: Any, saved: Mapping[str, Any]) -> None:
    for name in AVERAGES:
        setattr(model.base_model.rankallocator, name, dict(saved[name]))
    model.peft_config["default"].rank_pattern = saved["rank_pattern"]


METHOD = Method(
    schema=AdaLoraConfig,
    config=config,
    after_step=after_step,
    penalty=penalty,
    state=state,
    restore=restore,
)
