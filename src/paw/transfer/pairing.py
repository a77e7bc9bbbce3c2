"""One module of the source and one of the target, and what a method may know of the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from paw.errors import TransferError
from paw.models.adapters import Factors
from paw.models.layout import Heads
from paw.transfer.modules import BASIS, ROLES, Place, Role, basis_size, layer_of

if TYPE_CHECKING:
    from torch import Tensor

    from paw.transfer.linalg import Basis


@dataclass
class Site:
    """Two spaces seen at the same text positions, as second moments (uncentred, divided by the
    count).

    cross: n_s×n_t, gram_s: n_s×n_s, gram_t: n_t×n_t; float64 where models that run in float32 have
    spaces small enough for it, else float32. Maps that are found from them are float32. Shared by
    the modules that share the space, so that a map is computed once. held_s: N×n_s and held_t:
    N×n_t, float32, are positions of texts that the moments have not seen (N may be 0).
    """

    cross: Tensor
    gram_s: Tensor
    gram_t: Tensor
    held_s: Tensor
    held_t: Tensor
    _maps: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def procrustes(self) -> Tensor:
        """polar(C_st), n_s×n_t: x_s ≈ T·x_t, and its transpose the other way."""
        from paw.transfer.linalg import polar

        return polar(self.cross)

    def ridge_to_source(self, penalty: float | None) -> Tensor:
        """C_st(C_tt + λI)⁻¹, n_s×n_t; λ None is chosen on the positions held out."""
        found: Tensor = self.once(
            ("s", penalty),
            lambda: _ridge(self.cross, self.gram_t, penalty, self.held_t, self.held_s),
        )
        return found

    def ridge_to_target(self, penalty: float | None) -> Tensor:
        """C_ts(C_ss + λI)⁻¹, n_t×n_s; likewise."""
        found: Tensor = self.once(
            ("t", penalty),
            lambda: _ridge(self.cross.T, self.gram_s, penalty, self.held_s, self.held_t),
        )
        return found

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What several modules ask of one space, computed for the first of them."""
        if key not in self._maps:
            self._maps[key] = compute()
        return self._maps[key]


def _ridge(cross: Tensor, gram: Tensor, penalty: float | None, x: Tensor, y: Tensor) -> Tensor:
    from paw.transfer.linalg import best_penalty, ridge

    return ridge(cross, gram, best_penalty(cross, gram, x, y) if penalty is None else penalty)


@dataclass
class Side:
    """A module of one of the two models. Its weight is read, and its basis found, when first asked
    for."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], Tensor]  # out×in, float32
    find: Callable[[int], Basis]  # of so many singular vectors
    k: int = 0

    @cached_property
    def weight(self) -> Tensor:
        return self.read()

    @cached_property
    def basis(self) -> Basis:
        return self.find(self.k)


@dataclass
class Pair:
    """One module of the source and one of the target, and the spaces that two of their layers were
    seen to share.

    k is the number of singular vectors a side.
    """

    source: Side
    target: Side
    sites: Mapping[Place, Site]
    basis: int | None = None
    heads: tuple[Heads, Heads] | None = None
    residual: Site | None = None  # both residual streams, by the embeddings of shared tokens
    adapter: Factors | None = None  # the source module's own, for methods that look at it

    def __post_init__(self) -> None:
        self.source.k = self.target.k = self.k

    @cached_property
    def k(self) -> int:
        """What `transfer.basis` asks for, up to all; else what says something of an overlap."""
        smallest = min(*self.source.shape, *self.target.shape)
        return basis_size(smallest, BASIS) if self.basis is None else min(self.basis, smallest)

    @property
    def role(self) -> Role:
        return ROLES[layer_of(self.target.name)[1]]

    @property
    def reads(self) -> Site:
        return self.site(self.role.reads)

    @property
    def writes(self) -> Site:
        return self.site(self.role.writes)

    def site(self, place: Place) -> Site:
        """What was seen of a space of the two layers, for methods that declared they need text."""
        if place not in self.sites:
            raise TransferError(
                "transfer.evidence: this method needs activations. Remove the transfer.evidence "
                "override."
            )
        return self.sites[place]

    def equal_shapes(self, method: str) -> None:
        """For methods that map nothing."""
        if self.source.shape != self.target.shape:
            raise TransferError(
                f"transfer={method}: {self.source.name} is {self.source.shape} and "
                f"{self.target.name} {self.target.shape}, but it takes equal shapes only. Use a "
                "method that maps one space to another, such as procrustes or cross_lora."
            )
