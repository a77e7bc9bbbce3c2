"""Which module of the source goes to which of the target, and what a method may know of the two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from paw.errors import TransferError
from paw.transfer import linalg

LAYER = re.compile(r".*\blayers\.(\d+)\..*?(\w+)")


@dataclass(frozen=True)
class Place:
    """Where a space can be seen: at the input or output of the module with a role."""

    role: str
    side: str


@dataclass(frozen=True)
class Role:
    """The spaces a module reads from and writes to."""

    reads: Place
    writes: Place


# q, k, v share their input, gate and up too. gate and up have more outputs than inputs, so their outputs do not identify
# a map; the neurons behind the activation, which enter down_proj, have full rank and do.
ROLES = {
    "q_proj": Role(Place("q_proj", "in"), Place("q_proj", "out")),
    "k_proj": Role(Place("q_proj", "in"), Place("k_proj", "out")),
    "v_proj": Role(Place("q_proj", "in"), Place("v_proj", "out")),
    "o_proj": Role(Place("o_proj", "in"), Place("o_proj", "out")),
    "gate_proj": Role(Place("gate_proj", "in"), Place("down_proj", "in")),
    "up_proj": Role(Place("gate_proj", "in"), Place("down_proj", "in")),
    "down_proj": Role(Place("down_proj", "in"), Place("down_proj", "out")),
}


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

    def seen(self) -> tuple[Site, Site]:
        """Both sites, for methods that declared they need text."""
        assert self.reads is not None
        assert self.writes is not None
        return self.reads, self.writes


def layer_of(name: str) -> tuple[int, str]:
    """Layer and role of a module name.

    Raises:
        TransferError: for a module outside the layers, or of an unknown role.
    """
    match = LAYER.fullmatch(name)
    if not match or match[2] not in ROLES:
        raise TransferError(f"{name}: is none of the modules that can be transferred ({', '.join(ROLES)} of a layer). "
                            "Train the adapter on those: adapter.target_modules.")  # fmt: skip
    return int(match[1]), match[2]


def by_layer(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """Module names by layer and role; names of other modules are left out."""
    out: dict[int, dict[str, str]] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match and match[2] in ROLES:
            out.setdefault(int(match[1]), {})[match[2]] = name
    return out


def matched_layers(how: str, source: int, target: int) -> dict[int, int]:
    """Source layer by target layer. `proportional` keeps relative depth; `index` keeps the number, surplus is dropped."""
    if how == "index":
        return {t: t for t in range(min(source, target))}
    return {t: round(t * (source - 1) / max(1, target - 1)) for t in range(target)}


def pair_names(adapter: Iterable[str], target: Mapping[int, Mapping[str, str]], layers: Mapping[int, int]) -> list[tuple[str, str]]:
    """(source module, target module) for every target module whose twin the adapter has.

    Raises:
        TransferError: if there is none.
    """
    twins = {layer_of(name): name for name in adapter}
    pairs = [
        (twins[layers[t], role], name)
        for t, roles in sorted(target.items()) if t in layers
        for role, name in sorted(roles.items()) if (layers[t], role) in twins
    ]  # fmt: skip
    if not pairs:
        raise TransferError("no module of the adapter has a twin in the target: nothing would be transferred.")
    return pairs
