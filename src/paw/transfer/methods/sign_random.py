"""Placebo: cross_lora with another of the sign choices that an SVD may make. Where it does as well, or as badly, the signs
decided. Each pair of singular vectors is flipped on both sides at once, which leaves W as it is."""

from __future__ import annotations

import hashlib

import torch

from paw.transfer.config import SignRandomConfig
from paw.transfer.maps import Maps, Product
from paw.transfer.methods import Method
from paw.transfer.pairing import Pair


def maps(pair: Pair, config: SignRandomConfig) -> Maps:
    s, t = pair.source.basis, pair.target.basis
    seed = int.from_bytes(
        hashlib.sha256(f"{config.seed} {pair.source.name} {pair.target.name}".encode()).digest()[
            :7
        ],
        "big",
    )
    signs = (
        torch.randint(0, 2, (pair.k,), generator=torch.Generator().manual_seed(seed)).to(s.u) * 2
        - 1
    )
    return Maps(Product((s.v * signs, t.v.T)), Product((t.u * signs, s.u.T)))


METHOD = Method(maps)
