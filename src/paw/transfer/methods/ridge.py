"""Penalised least squares: T_in = C_st(C_tt + λI)⁻¹, T_out = C_ts(C_ss + λI)⁻¹.

At λ → 0 the exact minimiser of E‖T_out ΔW_s x_s − ΔW_t x_t‖² over all ΔW_t, and of the adapter's
rank by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import within
from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class RidgeConfig(TransferConfig):
    # λ, in units of the mean diagonal of the Gram matrix; null chooses it on held-out positions.
    penalty: Optional[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None:
            within("transfer.penalty", self.penalty, 0, 1e6)


def maps(pair: Pair, config: RidgeConfig) -> Maps:
    return Maps(
        Product((pair.reads.ridge_to_source(config.penalty),)),
        Product((pair.writes.ridge_to_target(config.penalty),)),
    )


METHOD = Method(maps, RidgeConfig)
