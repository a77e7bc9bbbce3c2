"""DoRA (arXiv 2402.09353) as two factors: W' = s∘(W + ΔW), a scale for each row, changes W by
s∘ΔW, of the adapter's rank, and (s − 1)∘W, which no few directions hold. What the largest of both
leave out is measured and told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paw.models.adapters import Factors, read_magnitudes

if TYPE_CHECKING:
    from paw.models.layout import Part
    from paw.models.tensors import Weights

MORE = 2  # ranks of the result for each of the adapter's


def folded(
    adapter: Path, found: Mapping[str, Factors], weights: Weights, parts: Mapping[str, Part]
) -> tuple[dict[str, Factors], float]:
    """
    Args:
        found: the adapter's factors by module, fused modules as their parts.
        weights, parts: of the base that it was trained on.

    Returns:
        The factors with their magnitudes folded in, of up to twice the rank; and the share of the
        change's energy ‖W' − W‖² that they do not hold, over all modules.
    """
    from paw.transfer.linalg import singular_basis

    scales, out, lost, whole = read_magnitudes(adapter), {}, 0.0, 0.0
    for name, factors in found.items():
        weight = weights[name]
        changed = weight + factors.b.to(weight.device) @ factors.a.to(weight.device)
        lengths, rows = scales[parts[name].module].to(weight.device), parts[name].rows
        scale = (lengths if rows is None else lengths[rows]) / changed.norm(dim=1)
        change = scale[:, None] * changed - weight
        top = singular_basis(change, min(MORE * factors.rank, *change.shape))
        out[name] = Factors(top.v.T.contiguous().cpu(), (top.u * top.values).cpu())
        lost += max(top.norm**2 - float(top.values.square().sum()), 0.0)
        whole += top.norm**2
    return out, lost / max(whole, 1e-300)
