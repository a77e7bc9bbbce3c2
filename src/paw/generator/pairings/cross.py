"""Every prompt with every checkpoint: prompts carry no information, and the best that can be learnt
is the mean checkpoint. The baseline."""

from __future__ import annotations

from collections.abc import Sequence

from paw.generator.checkpoints import Checkpoint
from paw.generator.groups import Group, roles
from paw.generator.pairings import Pair, Pairing


def pairs(
    groups: Sequence[Group], checkpoints: Sequence[Checkpoint], ratio: float, seed: int
) -> list[Pair]:
    of = roles(len(checkpoints), ratio, seed)
    return [
        Pair(i, j, group.role)
        for i, group in enumerate(groups)
        for j, role in enumerate(of)
        if role == group.role
    ]


PAIRING = Pairing(pairs=pairs, collects="trail")
