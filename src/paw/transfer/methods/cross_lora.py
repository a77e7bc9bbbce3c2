"""Cross-LoRA (arXiv 2508.05232) in its consistent reading: T_in = V_s V_tᵀ, T_out = U_t U_sᵀ.

As published it is degenerate: the minimiser of ‖P U_s − U_t‖ is U_t U_sᵀ with zero residual, which
pairs the i-th singular vector of one model with the i-th of the other, up to the arbitrary signs of
an SVD. Signs are fixed here by a rule (linalg.singular_basis), so that the result is at least one
result.
"""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    s, t = pair.source.basis, pair.target.basis
    return Maps(Product((s.v, t.v.T)), Product((t.u, s.u.T)))


METHOD = Method(maps)
