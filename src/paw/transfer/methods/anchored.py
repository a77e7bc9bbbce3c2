"""Procrustes between the top singular subspaces:

    T_in = V_s·polar(V_sᵀ C_st V_t)·V_tᵀ        T_out = U_t·polar(U_tᵀ C_ts U_s)·U_sᵀ

What cross_lora leaves to the order and the signs of singular vectors is fitted on activations here:
the result does not depend on which basis of a subspace is taken.
"""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    from paw.transfer.linalg import polar

    s, t = pair.source.basis, pair.target.basis
    t_in = (s.v, polar(s.v.T @ pair.reads.cross @ t.v), t.v.T)
    t_out = (t.u, polar(t.u.T @ pair.writes.cross.T @ s.u), s.u.T)
    return Maps(Product(t_in), Product(t_out))


METHOD = Method(maps)
