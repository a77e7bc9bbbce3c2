"""Procrustes between the top singular subspaces:

    T_in = V_s·polar(V_sᵀ C_st V_t)·V_tᵀ        T_out = U_t·polar(U_tᵀ C_ts U_s)·U_sᵀ

What cross_lora leaves to the order and the signs of singular vectors is fitted on activations here:
the result does not depend on which basis of a subspace is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig

if TYPE_CHECKING:
    from torch import Tensor


def maps(pair: Pair, config: TransferConfig) -> Maps:
    s, t = pair.source.basis, pair.target.basis
    t_in = (s.v, _between(s.v, pair.reads.cross, t.v), t.v.T)
    t_out = (t.u, _between(t.u, pair.writes.cross.T, s.u), s.u.T)
    return Maps(Product(t_in), Product(t_out))


def _between(left: Tensor, cross: Tensor, right: Tensor) -> Tensor:
    from paw.transfer.linalg import polar

    return polar(left.T.to(cross.dtype) @ cross @ right.to(cross.dtype))


METHOD = Method(maps)
