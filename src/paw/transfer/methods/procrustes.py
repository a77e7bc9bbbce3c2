"""Orthogonal maps between activations at the same text positions: T_in = polar(C_st),
T_out = polar(C_ts).

Schönemann 1966; uncentred, since the mean direction carries much of an adapter's effect. Orthogonal
maps keep norms, so noise in the statistics does not shrink the adapter as a regression does.
"""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    return Maps(Product((pair.reads.procrustes,)), Product((pair.writes.procrustes.T,)))


METHOD = Method(maps)
