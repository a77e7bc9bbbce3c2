"""Placebo: cross_lora with another of the sign choices that an SVD may make. Where it does as well,
or as badly, the signs decided. Each pair of singular vectors is flipped on both sides at once,
which leaves W as it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from paw.transfer.methods import Maps, Pair, Placebo, Product, TransferConfig


@dataclass
class SignRandomConfig(TransferConfig):
    seed: int = 0


def maps(pair: Pair, config: SignRandomConfig) -> Maps:
    import torch

    s, t = pair.source.basis, pair.target.basis
    drawn = f"{config.seed} {pair.source.name} {pair.target.name}".encode()
    seed = int.from_bytes(hashlib.sha256(drawn).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (pair.k,), generator=generator).to(s.u) * 2 - 1
    return Maps(Product((s.v * signs, t.v.T)), Product((t.u * signs, s.u.T)))


METHOD = Placebo(
    maps=maps, drawn=True, applies=lambda real: real.method == "cross_lora", schema=SignRandomConfig
)
