"""ProLoRA (arXiv 2506.04244) for one pair of modules: what lies in the source's top singular
subspace goes into the target's, what lies outside stays outside.

    T_in = P_s P_t + (I − P_s)(I − P_t)   with P = V Vᵀ, and likewise for outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paw.transfer.methods import Maps, Method, Pair, TransferConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InAndOut:
    """P_a P_b + (I − P_a)(I − P_b) for two orthonormal bases of one space (d×k)."""

    a: Tensor
    b: Tensor

    def right(self, x: Tensor) -> Tensor:
        inside = x @ self.a @ self.a.T
        outside = x - inside
        return inside @ self.b @ self.b.T + outside - outside @ self.b @ self.b.T

    def left(self, x: Tensor) -> Tensor:
        inside = self.b @ (self.b.T @ x)
        outside = x - inside
        return self.a @ (self.a.T @ inside) + outside - self.a @ (self.a.T @ outside)


def maps(pair: Pair, config: TransferConfig) -> Maps:
    pair.equal_shapes(config.method)
    s, t = pair.source.basis, pair.target.basis
    return Maps(InAndOut(s.v, t.v), InAndOut(t.u, s.u))


METHOD = Method(maps)
