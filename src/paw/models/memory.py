"""What a training needs of a device's memory, estimated from config.json: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.config.adapters import AdapterConfig
from paw.errors import ModelError

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
HELD = 14  # values of the model's width that autograd keeps of a token and layer, beside those of the feed-forward's
WIDE = 4  # values of the feed-forward's width
CHOICES = {
    "none": None,
    "nf4": 0.52,
    "int8": 1.0,
}  # bytes of a quantised weight, constants of its blocks included


@dataclass(frozen=True)
class Estimate:
    """GiB on one device."""

    weights: float
    adapter: float  # parameters, gradients and both averages of AdamW, float32
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.logits


def estimate(
    folder: Path,
    adapter: AdapterConfig,
    precision: str,
    tokens: int,
    shards: int,
    checkpointing: bool,
) -> Estimate:
    """
    Args:
        tokens: of a micro-batch.
        shards: devices that the base is spread over (fsdp), else 1.

    Raises:
        ModelError: for a config that is no model's.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as e:
        raise ModelError(
            f"{folder}: its config makes no model ({(str(e).splitlines() or [type(e).__name__])[0]})."
        ) from None
    text = config.get_text_config()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    if not getattr(text, "tie_word_embeddings", True):
        rest += text.vocab_size * text.hidden_size
    size, quantised = BYTES[precision], CHOICES[adapter.quantise]
    weights = rest * size + linear * (size if quantised is None else quantised)
    wide = getattr(text, "intermediate_size", 4 * text.hidden_size)
    a_layer = HELD * text.hidden_size + WIDE * wide
    layers = (
        1 + text.num_hidden_layers * text.hidden_size / a_layer
        if checkpointing
        else text.num_hidden_layers
    )
    gib = 2**30
    return Estimate(
        weights / shards / gib,
        _adapter_parameters(model, adapter, text) * 16 / gib,
        tokens * layers * a_layer * size / gib,
        tokens * text.vocab_size * 4 * 3 / gib,  # the logits, their softmax and its gradient
    )


def _adapter_parameters(model: Any, adapter: AdapterConfig, text: Any) -> int:
    import torch

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    rank = getattr(adapter, "init_r", getattr(adapter, "r", None))
    if rank is not None:
        wanted = getattr(adapter, "target_modules", ["all-linear"])
        chosen = [
            m
            for n, m in linears.items()
            if wanted == ["all-linear"] or n.rsplit(".", 1)[-1] in wanted
        ]
        return sum(rank * (m.in_features + m.out_features) for m in chosen)
    virtual = getattr(adapter, "virtual_tokens", None)
    if virtual is not None:
        return int(
            virtual
            * text.hidden_size
            * (2 * text.num_hidden_layers if adapter.method == "prefix_tuning" else 1)
        )
    return sum(m.out_features for m in linears.values()) // 3
