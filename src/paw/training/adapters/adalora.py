"""AdaLoRA (arXiv 2303.10512): ΔW = P Λ Q, singular values pruned where a triplet's sensitivity is low.

PEFT leaves two things to whoever trains: the allocation after every optimiser step, without which it is plain LoRA, and the
penalty ‖PᵀP − I‖ + ‖QQᵀ − I‖ (equation 4), which it adds only to a loss that it computes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paw.config.adapters import AdaLoraConfig
from paw.errors import ConfigError
from paw.training.adapters import Method, Setting, targets

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def config(c: AdaLoraConfig, setting: Setting) -> Any:
    import peft

    first, last = round(c.warmup * setting.steps), round(c.settle * setting.steps)
    if setting.steps - first - last < c.every:
        raise ConfigError(
            f"adapter=adalora: of {setting.steps} steps, {setting.steps - first - last} are left for ranks to fall, fewer "
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
    for (
        name
    ) in AVERAGES:  # read from a checkpoint they are where that was read, and the model moved on
        averages = getattr(model.base_model.rankallocator, name)
        averages.update({k: v.to(device) for k, v in averages.items() if v.device != device})
    model.base_model.update_and_allocate(step)


def penalty(model: Any) -> Any:
    """The mean Frobenius norm over all factors, weighed as the configuration says (PEFT's form of equation 4)."""
    import torch

    weight = model.peft_config["default"].orth_reg_weight
    found = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            found.append(
                torch.linalg.matrix_norm(
                    gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)
                )
            )
    return weight * torch.stack(found).mean()


def state(model: Any) -> Mapping[str, Any]:
    allocator = model.base_model.rankallocator
    return {name: getattr(allocator, name) for name in AVERAGES} | {
        "rank_pattern": model.peft_config["default"].rank_pattern
    }


def restore(model: Any, saved: Mapping[str, Any]) -> None:
    for name in AVERAGES:
        setattr(model.base_model.rankallocator, name, dict(saved[name]))
    model.peft_config["default"].rank_pattern = saved["rank_pattern"]


METHOD = Method(config, after_step=after_step, penalty=penalty, state=state, restore=restore)
