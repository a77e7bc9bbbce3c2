"""What is measured of a pair of modules and its maps: a row of the report."""

from __future__ import annotations

from typing import Any

from paw.models.adapters import Factors
from paw.transfer.maps import Maps
from paw.transfer.pairing import Pair

Row = dict[str, Any]


def measured(pair: Pair, maps: Maps, old: Factors, mapped: Factors) -> Row:
    """How alike the two weights are, as they are and once mapped (`…chance`: what random subspaces
    would have), how much of the update the maps keep, and how well they carry activations over.

    Args:
        old, mapped: the source module's factors, and those before the gain.
    """
    similarity, chance = _similarity(pair, maps)
    r2_in, r2_out = _explained(pair, maps)
    return {
        "similarity": similarity,
        "chance": chance,
        "excess": similarity - chance,
        "phi": phi(pair),
        "weights": _weights(pair),
        "weights_chance": 1 / max(pair.source.shape[0], pair.target.shape[0]),
        "kept_energy": (mapped.norm() / max(old.norm(), 1e-30)) ** 2,
        "r2_in": r2_in,
        "r2_out": r2_out,
    }


def norms(before: tuple[Factors, float], after: tuple[Factors, float]) -> Row:
    """‖ΔW‖, and beside the norm of its weight."""
    row: Row = {}
    for when, (factors, weight) in (("before", before), ("after", after)):
        row[f"norm_{when}"] = factors.norm()
        row[f"relative_{when}"] = factors.norm() / max(weight, 1e-30)
    return row


def phi(pair: Pair) -> float | None:
    """Φ = ‖U_sᵀU_t‖²_F/k of the weights as they are, mean of both sides; None for different
    shapes."""
    s, t = pair.source.basis, pair.target.basis
    if pair.source.shape != pair.target.shape:
        return None
    return float((s.u.T @ t.u).square().sum() + (s.v.T @ t.v).square().sum()) / (2 * pair.k)


def _similarity(pair: Pair, maps: Maps) -> tuple[float, float]:
    """How much of the target's top singular subspaces the source's fill once mapped, mean of both
    sides; and its chance level. For equal shapes and the identity this is Φ of the weights; for
    cross_lora it is 1 by construction."""
    from paw.transfer.linalg import overlap

    s, t = pair.source.basis, pair.target.basis
    out, into = overlap(maps.t_out.left(s.u), t.u), overlap(maps.t_in.right(s.v.T).T, t.v)
    return (out + into) / 2, (pair.k / len(t.u) + pair.k / len(t.v)) / 2


def _weights(pair: Pair) -> float:
    """‖U_sᵀU_t‖²_F/k² of the two weights' top left singular subspaces, the source systems' measure.
    Of different widths the smaller is filled up with zeros, so that two random subspaces have 1 in
    the larger width."""
    s, t = pair.source.basis.u, pair.target.basis.u
    width = min(len(s), len(t))
    return float((s[:width].T @ t[:width]).square().sum()) / pair.k**2


def _explained(pair: Pair, maps: Maps) -> tuple[float | None, float | None]:
    """R² of both maps on the positions held out, x_s ≈ T_in x_t and y_t ≈ T_out y_s; None where no
    text was run."""
    from paw.transfer.linalg import explained

    seen = {pair.role.reads, pair.role.writes} <= pair.sites.keys()
    if not seen or len(pair.reads.held_s) < 2:
        return None, None
    reads, writes = pair.reads, pair.writes
    return (
        explained(reads.held_s, maps.t_in.left(reads.held_t.T).T),
        explained(writes.held_t, maps.t_out.left(writes.held_s.T).T),
    )
