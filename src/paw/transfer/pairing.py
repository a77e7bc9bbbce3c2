"""One module of the source and one of the target, and what a method may know of the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from paw.errors import TransferError
from paw.transfer import linalg


@dataclass
class Site:
    """Two spaces seen at the same text positions, as second moments (uncentred, divided by the count).

    cross: n_s×n_t, gram_s: n_s×n_s, gram_t: n_t×n_t, float32. Shared by the modules that share the space, so that a map
    is computed once.
    """

    cross: Tensor
    gram_s: Tensor
    gram_t: Tensor
    _maps: dict[Any, Tensor] = field(default_factory=dict)

    @cached_property
    def procrustes(self) -> Tensor:
        """polar(C_st), n_s×n_t: x_s ≈ T·x_t, and its transpose the other way."""
        return linalg.polar(self.cross)

    def ridge_to_source(self, penalty: float) -> Tensor:
        """C_st(C_tt + λI)⁻¹, n_s×n_t."""
        if ("s", penalty) not in self._maps:
            self._maps["s", penalty] = linalg.ridge(self.cross, self.gram_t, penalty)
        return self._maps["s", penalty]

    def ridge_to_target(self, penalty: float) -> Tensor:
        """C_ts(C_ss + λI)⁻¹, n_t×n_s."""
        if ("t", penalty) not in self._maps:
            self._maps["t", penalty] = linalg.ridge(self.cross.T, self.gram_s, penalty)
        return self._maps["t", penalty]


@dataclass
class Pair:
    """One module of the source and one of the target. `reads` and `writes` are None where no text was run."""

    source: str
    target: str
    w_s: Tensor
    w_t: Tensor
    reads: Site | None
    writes: Site | None
    basis: int

    @cached_property
    def k(self) -> int:
        """Singular vectors a side: at most half of the smallest dimension, beyond which subspaces say little."""
        return max(1, min(self.basis, int(min(*self.w_s.shape, *self.w_t.shape)) // 2))

    @cached_property
    def basis_s(self) -> tuple[Tensor, Tensor]:
        return linalg.singular_basis(self.w_s, self.k)

    @cached_property
    def basis_t(self) -> tuple[Tensor, Tensor]:
        return linalg.singular_basis(self.w_t, self.k)

    def equal_shapes(self, method: str) -> None:
        """For methods that map nothing."""
        if self.w_s.shape != self.w_t.shape:
            raise TransferError(
                f"transfer={method}: {self.source} is {tuple(self.w_s.shape)} and {self.target} {tuple(self.w_t.shape)}, but it takes "
                "equal shapes only. Use a method that maps one space to another, such as procrustes or cross_lora."
            )

    def seen(self) -> tuple[Site, Site]:
        """Both sites, for methods that declared they need text."""
        if self.reads is None or self.writes is None:
            raise TransferError("transfer.evidence=weights: this method looks at activations. Leave it at text.")
        return self.reads, self.writes
