"""Penalised least squares: T_in = C_st(C_tt + λI)⁻¹, T_out = C_ts(C_ss + λI)⁻¹.

At λ → 0 the exact minimiser of E‖T_out ΔW_s x_s − ΔW_t x_t‖² over all ΔW_t, and of the adapter's rank by itself.
"""

from __future__ import annotations

from paw.transfer.config import RidgeConfig
from paw.transfer.maps import Maps, Product
from paw.transfer.methods import Method
from paw.transfer.pairing import Pair


def maps(pair: Pair, config: RidgeConfig) -> Maps:
    return Maps(
        Product((pair.reads.ridge_to_source(config.penalty),)),
        Product((pair.writes.ridge_to_target(config.penalty),)),
    )


METHOD = Method(maps)
