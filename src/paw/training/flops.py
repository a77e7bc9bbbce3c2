"""How much of a device's arithmetic a training uses: model FLOPs utilisation (PaLM, arXiv
2204.02311, appendix B)."""

from __future__ import annotations

import re

import torch

# Peaks of dense 16-bit products with sums in float32, in FLOP a second, by the device's name as the
# driver gives it; the makers' data sheets. Sparsity, which doubles them, is not counted. Variants
# with other clocks (PCIe, NVL, laptops, the 4090 D) and slices (MIG) are not known.
PEAKS = {
    r"RTX 3090$": 71e12,
    r"RTX 4090$": 165.2e12,
    r"\b(A100|A800)\b(?!.*MIG)": 312e12,
    r"\bL40S$": 362e12,
    r"\b(H100|H800|H200)\b(?!.*(PCIe|NVL|MIG))": 989e12,
    r"\bB200\b(?!.*MIG)": 2250e12,
}
FROZEN = 4  # FLOPs a token and parameter: forward, and backward to what enters, each 2


def utilisation(
    *, parameters: int, trainable: int, tokens_per_second: float, device: str, devices: int
) -> float | None:
    """The share of the peak of all devices, 0 to 1; None where a device's peak is not known.

    A token costs 2 FLOPs a parameter forward, 2 for the gradient of what enters a layer, and 2 for
    that of its weights, where these are trained. What attention itself multiplies is left out, as
    are products that are computed twice to save memory, and a head that is the embedding table, of
    which a token of a prompt needs nothing: it is what the model needs, not what was done.

    Args:
        parameters: of the model without its embeddings.
        trainable: those of them that have gradients.
        tokens_per_second: of all devices together.
        device: its name, as torch has it.
    """
    peak = next((peak for name, peak in PEAKS.items() if re.search(name, device)), None)
    if peak is None:
        return None
    needed = (FROZEN * parameters + 2 * trainable) * tokens_per_second
    return needed / (peak * devices)


def device_name(device: torch.device) -> str | None:
    """As its maker calls it; None of a CPU, whose peak depends on what it is asked."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
