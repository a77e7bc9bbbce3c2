"""A linear map kept as factors, applied to thin matrices only: never a d×d product where two thin
ones do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class LinearMap(Protocol):
    def right(self, a: Tensor) -> Tensor:
        """a·T for a: r×rows, giving r×columns."""

    def left(self, b: Tensor) -> Tensor:
        """T·b for b: columns×r, giving rows×r."""


@dataclass(frozen=True)
class Product:
    """T = F₁·F₂·…"""

    factors: tuple[Tensor, ...]

    def right(self, a: Tensor) -> Tensor:
        for f in self.factors:
            a = a @ f
        return a

    def left(self, b: Tensor) -> Tensor:
        for f in reversed(self.factors):
            b = f @ b
        return b


@dataclass(frozen=True)
class Eye:
    """The identity cut, or filled with zeros, to rows×columns."""

    rows: int
    columns: int

    def right(self, a: Tensor) -> Tensor:
        from torch.nn.functional import pad

        return pad(a[:, : self.columns], (0, max(0, self.columns - self.rows)))

    def left(self, b: Tensor) -> Tensor:
        from torch.nn.functional import pad

        return pad(b[: self.rows], (0, 0, 0, max(0, self.rows - self.columns)))


@dataclass(frozen=True)
class Maps:
    """What a method chooses for a pair of modules: x_s ≈ T_in·x_t (n_s×n_t) and y_t ≈ T_out·y_s
    (m_t×m_s)."""

    t_in: LinearMap
    t_out: LinearMap
