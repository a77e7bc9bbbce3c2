"""Both subspaces in turn: T_in = V_s V_sᵀ V_t V_tᵀ, T_out = U_t U_tᵀ U_s U_sᵀ, where the widths
agree; a side whose widths differ is paired as cross_lora pairs it."""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    s, t = pair.source.basis, pair.target.basis
    t_in = (s.v, s.v.T, t.v, t.v.T) if len(s.v) == len(t.v) else (s.v, t.v.T)
    t_out = (t.u, t.u.T, s.u, s.u.T) if len(s.u) == len(t.u) else (t.u, s.u.T)
    return Maps(Product(t_in), Product(t_out))


METHOD = Method(maps)
