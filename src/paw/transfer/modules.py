"""Modules by their names: layers, roles, and the spaces that modules of two models share.

Imports no torch: a plan is made from names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from paw.errors import TransferError

SMALL = 1024  # matrices up to this size are worked on in float64: it costs little and saves digits
LAYER = re.compile(r".*\blayers\.(\d+)\..*?(\w+)")


@dataclass(frozen=True)
class Place:
    """Where a space can be seen: at the input (`in`) or output (`out`) of the module with a role; a
    layer's `update` is the difference of both, and `stream` the residual stream that enters the
    norm before it."""

    role: str
    side: str


@dataclass(frozen=True)
class Role:
    """The spaces a module reads from and writes to."""

    reads: Place
    writes: Place

    @property
    def onto_stream(self) -> bool:
        """Whether the module writes to the residual stream; the others read from it."""
        return self.writes in STREAM


# Where the residual stream enters and leaves a layer's modules.
STREAM = (
    Place("q_proj", "in"),
    Place("gate_proj", "in"),
    Place("o_proj", "out"),
    Place("down_proj", "out"),
)

# q, k, v share their input, gate and up too. gate and up have more outputs than inputs, so their
# outputs do not identify a map; the neurons behind the activation, which enter down_proj, have full
# rank and do.
ROLES = {
    "q_proj": Role(Place("q_proj", "in"), Place("q_proj", "out")),
    "k_proj": Role(Place("q_proj", "in"), Place("k_proj", "out")),
    "v_proj": Role(Place("q_proj", "in"), Place("v_proj", "out")),
    "o_proj": Role(Place("o_proj", "in"), Place("o_proj", "out")),
    "gate_proj": Role(Place("gate_proj", "in"), Place("down_proj", "in")),
    "up_proj": Role(Place("gate_proj", "in"), Place("down_proj", "in")),
    "down_proj": Role(Place("down_proj", "in"), Place("down_proj", "out")),
}

UPDATE = Place("layer", "update")  # what a layer adds to the residual stream
BASIS = 320  # singular vectors kept a side, unless transfer.basis says otherwise
# Positions on which maps are judged, at most; of texts that they are not fitted on.
HELD = 512

# A space of a model: layer and place. A matching: (source layer, target layer).
Space = tuple[int, Place]
Layers = Sequence[tuple[int, int]]
Names = Sequence[tuple[str, str]]  # of module pairs: source, target


def layer_of(name: str) -> tuple[int, str]:
    """Layer and role of a module name.

    Raises:
        TransferError: for a module outside the layers, or of an unknown role.
    """
    match = LAYER.fullmatch(name)
    if not match or match[2] not in ROLES:
        raise TransferError(
            f"{name}: is none of the modules that can be transferred ({', '.join(ROLES)} of a "
            "layer). Train the adapter on those: adapter.target_modules."
        )
    return int(match[1]), match[2]


def layer_module(name: str) -> str:
    """The layer itself: `model.layers.3` of `model.layers.3.self_attn.q_proj`."""
    match = LAYER.fullmatch(name)
    assert match is not None, name
    return name[: match.end(1)]


def basis_size(smallest: int, most: int) -> int:
    """How many singular vectors to keep where nobody says: at most half of the smallest dimension,
    for the more of a space two subspaces fill, the less their overlap says."""
    return max(1, min(most, smallest // 2))


def by_layer(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """Module names by layer and role; names of other modules are left out."""
    out: dict[int, dict[str, str]] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match and match[2] in ROLES:
            roles = out.setdefault(int(match[1]), {})
            if match[2] in roles:
                raise TransferError(
                    f"{name}: layer {match[1]} has several {match[2]}; mixtures of experts cannot "
                    "be transferred."
                )
            roles[match[2]] = name
    return out


def pair_names(
    adapter: Iterable[str],
    target: Mapping[int, Mapping[str, str]],
    layers: Layers,
    roles: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """(source module, target module) of matched layers for every target module whose twin the
    adapter has.

    Args:
        roles: the only ones that are paired; empty means all.

    Raises:
        TransferError: if there is none.
    """
    twins = {layer_of(name): name for name in adapter}
    if roles:
        have = sorted({role for _, role in twins})
        twins = {place: name for place, name in twins.items() if place[1] in roles}
        if not twins:
            raise TransferError(
                f"transfer.modules={list(roles)}: the adapter has none of these. "
                f"It has: {', '.join(have)}."
            )
    pairs = [
        (twins[s, role], name)
        for s, t in layers
        for role, name in sorted(target.get(t, {}).items())
        if (s, role) in twins
    ]
    if not pairs:
        raise TransferError(
            "no module of the adapter has a twin in the target: nothing would be transferred."
        )
    return pairs


def shared_spaces(pairs: Sequence[tuple[str, str]]) -> list[tuple[Space, Space]]:
    """The spaces (source, target) that the maps of these module pairs join, each once."""
    found: dict[tuple[Space, Space], None] = {}
    for source, target in pairs:
        (layer_s, role), (layer_t, _) = layer_of(source), layer_of(target)
        for place in (ROLES[role].reads, ROLES[role].writes):
            found[(layer_s, place), (layer_t, place)] = None
    return list(found)


def all_pairs(
    source: Mapping[int, Mapping[str, str]], target: Mapping[int, Mapping[str, str]], layers: Layers
) -> list[tuple[str, str]]:
    """Every (source module, target module) of the same role in matched layers, whatever an adapter
    holds."""
    return pair_names(
        [name for roles in source.values() for name in roles.values()], target, layers
    )


def moments_bytes(
    pairs: Sequence[tuple[str, str]],
    shapes_s: Mapping[str, Sequence[int]],
    shapes_t: Mapping[str, Sequence[int]],
) -> int:
    """The most that what is kept takes, of all spaces that these pairs share: cross products and
    both Grams, in float64 where they are small, and positions held out."""
    seen_s, seen_t = by_layer(shapes_s), by_layer(shapes_t)

    def width(
        space: Space, names: Mapping[int, Mapping[str, str]], shapes: Mapping[str, Sequence[int]]
    ) -> int:
        rows, columns = shapes[names[space[0]][space[1].role]]
        return columns if space[1].side == "in" else rows

    total = 0
    for s, t in shared_spaces(pairs):
        n_s, n_t = width(s, seen_s, shapes_s), width(t, seen_t, shapes_t)
        for rows, columns in ((n_s, n_t), (n_s, n_s), (n_t, n_t)):
            total += rows * columns * (8 if max(rows, columns) <= SMALL else 4)
        total += 4 * HELD * (n_s + n_t)
    return total
