"""The factor on ΔW_t, so that it counts for as much in the target as ΔW_s in the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paw.models.adapters import Factors
from paw.transfer.pairing import Pair

if TYPE_CHECKING:
    from torch import Tensor


def gain_of(pair: Pair, old: Factors, new: Factors, gain: str) -> float:
    """
    Args:
        gain: `activation`: the update's output has the share of the module's own output energy
            that ΔW_s has, on the same text: tr((BᵀB)(A C Aᵀ)) / tr(W C Wᵀ), C the second moment of
            the module's input. `weight`: ‖ΔW‖/‖W‖ is kept. `none`, or a number.
    """
    if gain == "none":
        return 1.0
    source, target = pair.source, pair.target
    if gain == "weight":
        before = old.norm() / max(source.basis.norm, 1e-30)
        return before / max(new.norm() / target.basis.norm, 1e-30)
    if gain != "activation":
        return float(gain)
    device = source.weight.device
    share_s = _energy(old.a.to(device), old.b.to(device), pair.reads.gram_s, source.weight)
    share_t = _energy(new.a, new.b, pair.reads.gram_t, target.weight)
    return float((share_s / max(share_t, 1e-30)) ** 0.5)


def _energy(a: Tensor, b: Tensor, gram: Tensor, w: Tensor) -> float:
    """Of a weight that puts nothing out the share is without bound, so the gain is 0: such a module
    gets nothing."""
    gram = gram.float()
    update, own = ((b.T @ b) * (a @ gram @ a.T)).sum(), ((w @ gram) * w).sum()
    return float(update.clamp_min(0) / own.clamp_min(1e-30))
