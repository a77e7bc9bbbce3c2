"""The projection of the source systems' notes: the adapter's own singular subspaces against those
of the target's base.

Of ΔW_s = U_a Σ V_aᵀ (rank r, at most 16 directions) and the target's top r singular vectors U_t,
V_t:

    T_in = V_t V_tᵀ      T_out = U_t U_tᵀ      where the two models' widths agree
    T_in = V_a V_tᵀ      T_out = U_t U_aᵀ      elsewhere: the i-th of one with the i-th of the other

The first is the Frobenius-nearest ΔW_t in those subspaces. Kept at the adapter's rank. `frobenius`
looks at the two bases' subspaces instead, and at many more directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig

if TYPE_CHECKING:
    from torch import Tensor

    from paw.models.adapters import Factors

MOST = 16  # directions


def maps(pair: Pair, config: TransferConfig) -> Maps:
    assert pair.adapter is not None
    t = pair.target.basis
    r = min(pair.adapter.rank, MOST, t.u.shape[1])
    u_a, v_a = (x.to(t.u) for x in _subspaces(pair.adapter, r))
    u_t, v_t = t.u[:, :r], t.v[:, :r]
    t_in = (v_t, v_t.T) if len(v_a) == len(v_t) else (v_a, v_t.T)
    t_out = (u_t, u_t.T) if len(u_a) == len(u_t) else (u_t, u_a.T)
    return Maps(Product(t_in), Product(t_out))


def _subspaces(adapter: Factors, r: int) -> tuple[Tensor, Tensor]:
    """The top r singular vectors of B·A (U: m×r, V: n×r), by QR of both factors; each pair's sign
    makes the largest entry of its left vector positive."""
    import torch

    q_b, r_b = torch.linalg.qr(adapter.b.double())
    q_a, r_a = torch.linalg.qr(adapter.a.double().T)
    x, _, yh = torch.linalg.svd(r_b @ r_a.T)
    u, v = (q_b @ x)[:, :r], (q_a @ yh.T)[:, :r]
    sign = u[u.abs().argmax(dim=0), torch.arange(r)].sign()
    return u * sign, v * sign


METHOD = Method(maps)
