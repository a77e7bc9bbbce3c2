"""From one warm checkpoint a short training on each prompt's own examples: a true map from prompts
to adapters, within one basin."""

from __future__ import annotations

from collections.abc import Sequence

from paw.generator.checkpoints import Checkpoint
from paw.generator.groups import Group
from paw.generator.pairings import Pair, Pairing, matched


def pairs(
    groups: Sequence[Group], checkpoints: Sequence[Checkpoint], ratio: float, seed: int
) -> list[Pair]:
    return matched(groups, checkpoints, lambda i, g, c: c.group == i)


PAIRING = Pairing(pairs=pairs, collects="branches")
