"""LoRA's forward pass y = xWᵀ + s·hBᵀ, h = A·dropout(x), with the sum and the scale inside the
product.

PEFT computes the product, scales it and adds it: three passes over an output that is hundreds of
times larger than h, and as many on the way back. On a CPU memory is what is waited for
(benchmarks/lora_sum.py). Only where nothing else is asked of a layer: LoRA in float32 on a plain
linear map.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def use(model: Any) -> None:
    """Gives every plain LoRA layer of an adapted model this forward pass; the layers' parameters
    stay PEFT's."""
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if (
            type(layer) is Linear
            and type(layer.base_layer) is torch.nn.Linear
            and not layer.lora_variant
            and not layer.lora_bias["default"]
        ):
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    h = layer.lora_A["default"](layer.lora_dropout["default"](x))
    base = layer.base_layer
    found: torch.Tensor = _Sum.apply(
        x, base.weight, base.bias, h, layer.lora_B["default"].weight, layer.scaling["default"]
    )  # type: ignore[no-untyped-call]
    return found


class _Sum(torch.autograd.Function):
    """x (… × in), W (out × in, frozen), bias (out, frozen) or None, h (… × r), B (out × r), s →
    xWᵀ + bias + s·hBᵀ (… × out)."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, h: Any, b: Any, s: float) -> Any:  # type: ignore[override]
        flat, h = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
        y = flat @ w.t() if bias is None else torch.addmm(bias, flat, w.t())
        y.addmm_(h, b.t(), alpha=s)
        ctx.save_for_backward(w, b, h)
        ctx.s, ctx.shape = s, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        w, b, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        to_h = (g @ b).mul_(ctx.s).view(*grad.shape[:-1], -1)
        to_b = (g.t() @ h).mul_(ctx.s)
        to_x = (g @ w).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_h, to_b, None
