"""What was seen in the steps (t−w, t] of a training with the checkpoint after step t."""

from __future__ import annotations

from collections.abc import Sequence

from paw.generator.checkpoints import Checkpoint
from paw.generator.groups import Group
from paw.generator.pairings import Pair, Pairing, matched


def pairs(
    groups: Sequence[Group], checkpoints: Sequence[Checkpoint], ratio: float, seed: int
) -> list[Pair]:
    return matched(groups, checkpoints, lambda i, g, c: g.step is not None and g.step == c.step)


PAIRING = Pairing(pairs=pairs, collects="trail")
