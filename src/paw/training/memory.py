"""What a training needs of a device's memory, estimated from config.json: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.config.common import HardwareConfig
from paw.errors import ConfigError, ModelError
from paw.models.load import resolve_runtime
from paw.text import first_line
from paw.training.adapters import AdapterConfig
from paw.training.config import TrainConfig
from paw.training.train import MICRO

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# Values of the model's width, and of the feed-forward's, that autograd keeps of a token and layer.
HELD, WIDE = 14, 4
# Bytes of a quantised weight, constants of its blocks included.
QUANTISED = {"nf4": 0.52, "int8": 1.0}


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


def check_memory(
    folder: Path, adapter: AdapterConfig, train: TrainConfig, hardware: HardwareConfig
) -> str:
    """What a training is likely to need at most, in words.

    Raises:
        ConfigError: where base and adapter alone are more than a device has.
    """
    runtime = resolve_runtime(hardware)
    tokens = -(-train.batch_size // (train.accumulate or 1)) * train.max_length
    if train.accumulate is None and runtime.device == "cpu":
        tokens = min(tokens, max(MICRO, train.max_length))
    shards = runtime.devices if runtime.strategy == "fsdp" else 1
    found = estimate(
        folder, adapter, runtime.precision, tokens, shards, train.gradient_checkpointing
    )
    said = (
        f"at most about {found.total:.1f} GiB a device ({found.weights:.1f} weights, "
        f"{found.adapter:.1f} adapter, {found.activations:.1f} activations, {found.logits:.1f} "
        f"logits) with micro-batches of {tokens} tokens"
    )
    room = _room(hardware, runtime.device)
    if found.weights + found.adapter > room:
        raise ConfigError(
            f"{said}; a device has {room:.0f}. Choose adapter=qlora, hardware.strategy=fsdp or a "
            "smaller model."
        )
    if found.total > room:
        return (
            f"{said}; a device has {room:.0f}, so micro-batches will be halved (train.accumulate)"
        )
    return said


def _room(hardware: HardwareConfig, device: str) -> float:
    """GiB of one device."""
    if hardware.memory_gb is not None:
        return hardware.memory_gb
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)
    import psutil

    return float(psutil.virtual_memory().total / 2**30)


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
        raise ModelError(f"{folder}: its config makes no model ({first_line(e)}).") from None
    text = config.get_text_config()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    if not getattr(text, "tie_word_embeddings", True):
        rest += text.vocab_size * text.hidden_size
    size = BYTES[precision]
    weights = rest * size + linear * QUANTISED.get(adapter.quantise, size)
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
