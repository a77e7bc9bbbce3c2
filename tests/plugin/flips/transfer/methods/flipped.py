"""Both models' dimensions in opposite order: a method with a parameter of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paw.transfer.config import TransferConfig
from paw.transfer.methods import Method

if TYPE_CHECKING:
    from paw.transfer.maps import Maps
    from paw.transfer.pairing import Pair


@dataclass
class FlippedConfig(TransferConfig):
    shrink: float = 1.0


def maps(pair: Pair, config: FlippedConfig) -> Maps:
    import torch

    from paw.transfer.maps import Maps, Product

    def flip(rows: int, columns: int) -> torch.Tensor:
        return config.shrink * torch.eye(max(rows, columns))[:rows, :columns].flip(1)

    (out_s, in_s), (out_t, in_t) = pair.source.shape, pair.target.shape
    return Maps(Product((flip(in_s, in_t),)), Product((flip(out_t, out_s),)))


METHOD = Method(maps, schema=FlippedConfig)
