"""A factor for each rank direction of a LoRA that else stays as it is: ΔW = B·diag(g)·A. A few
hundred numbers, which cannot learn a task by themselves: only how loudly each part of a transferred
adapter should speak.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paw.errors import ConfigError
from paw.training.adapters import AdapterConfig, Method, Setting

ADAPTER, GAIN = "default", "gain"


def config(c: AdapterConfig, setting: Setting) -> Any:
    raise ConfigError("adapter.method=gains: there is no adapter whose gains could be learnt.")


def prepare(model: Any, setting: Setting) -> None:
    """Freezes the factors, and puts a gain of 1 between those of every module."""
    import torch

    for layer in _layers(model):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        a.weight.requires_grad_(False)
        b.weight.requires_grad_(False)
        gain = torch.nn.Parameter(torch.ones(len(a.weight), device=a.weight.device))
        a.register_parameter(GAIN, gain)
        a.register_forward_hook(lambda module, args, out: (out * module.gain).to(out.dtype))


def saved(model: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The factors with their gains multiplied into B."""
    out = {}
    for name, layer in model.named_modules():
        gain = tensors.get(f"{name}.lora_A.{ADAPTER}.{GAIN}")
        if gain is not None:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            out[f"{name}.lora_A.{ADAPTER}.weight"] = a.detach()
            out[f"{name}.lora_B.{ADAPTER}.weight"] = b.detach() * gain.to(b.device)
    return out


def _layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if ADAPTER in getattr(m, "lora_A", {})]


METHOD = Method(schema=AdapterConfig, config=config, prepare=prepare, saved=saved)
