"""Both subspaces in turn: T_in = V_s V_sᵀ V_t V_tᵀ, T_out = U_t U_tᵀ U_s U_sᵀ, where the widths agree; a side whose widths
differ is paired as cross_lora pairs it."""

from __future__ import annotations

from paw.config.schema import TransferConfig
from paw.transfer.maps import Maps, Product
from paw.transfer.methods import Method
from paw.transfer.pairing import Pair


def maps(pair: Pair, config: TransferConfig) -> Maps:
    (u_s, v_s), (u_t, v_t) = pair.basis_s, pair.basis_t
    t_in = (v_s, v_s.T, v_t, v_t.T) if len(v_s) == len(v_t) else (v_s, v_t.T)
    t_out = (u_t, u_t.T, u_s, u_s.T) if len(u_s) == len(u_t) else (u_t, u_s.T)
    return Maps(Product(t_in), Product(t_out))


METHOD = Method(maps)
