"""How much of a device's arithmetic a training uses: model FLOPs utilisation (PaLM, arXiv
2204.02311, appendix B)."""

from __future__ import annotations

import torch

# Peaks of dense 16-bit products with sums in float32, in FLOP a second, by a part of the device's
# name; the makers' data sheets. Sparsity, which doubles them, is not counted.
PEAKS = {
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
}
FROZEN = 4  # FLOPs a token and parameter: forward, and backward to what enters, each 2


def utilisation(
    *, parameters: int, trainable: int, tokens_per_second: float, device: str, devices: int
) -> float | None:
    """The share of the peak of all devices, 0 to 1; None where a device's peak is not known.

    A token costs 2 FLOPs a parameter forward, 2 for the gradient of what enters a layer, and 2 for
    that of its weights, where these are trained. What attention itself multiplies is left out, as
    are products that are computed twice to save memory: it is what the model needs, not what was
    done.

    Args:
        parameters: of the model without its embeddings.
        trainable: those of them that have gradients.
        tokens_per_second: of all devices together.
        device: its name, as torch has it.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    if peak is None:
        return None
    needed = (FROZEN * parameters + 2 * trainable) * tokens_per_second
    return needed / (peak * devices)


def device_name(device: torch.device) -> str | None:
    """As its maker calls it; None of a CPU, whose peak depends on what it is asked."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
