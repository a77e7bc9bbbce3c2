"""Prompts of a task with the adapters of that task (arXiv 2506.16406); whole tasks are held out."""

from __future__ import annotations

from collections.abc import Sequence

from paw.generator.checkpoints import Checkpoint
from paw.generator.groups import Group
from paw.generator.pairings import Pair, Pairing, matched


def pairs(
    groups: Sequence[Group], checkpoints: Sequence[Checkpoint], ratio: float, seed: int
) -> list[Pair]:
    return matched(groups, checkpoints, lambda i, g, c: g.task == c.task)


PAIRING = Pairing(pairs=pairs, collects="tasks")
