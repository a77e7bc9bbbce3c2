"""LoRA-X (arXiv 2501.16559): kept is what lies in the target's top singular subspaces,
T_in = V_t V_tᵀ, T_out = U_t U_tᵀ."""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    pair.equal_shapes(config.method)
    t = pair.target.basis
    return Maps(Product((t.v, t.v.T)), Product((t.u, t.u.T)))


METHOD = Method(maps)
