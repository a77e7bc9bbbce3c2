"""One file for each way of giving prompts their checkpoints, found by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from paw import plugins
from paw.generator.checkpoints import Checkpoint
from paw.generator.config import PAIRINGS
from paw.generator.groups import Group


@dataclass(frozen=True)
class Pair:
    """A prompt and an adapter that it should become, by their numbers."""

    group: int
    checkpoint: int
    role: str


@dataclass(frozen=True, kw_only=True)
class Pairing:
    # (groups, checkpoints, share that is held out, seed) -> pairs
    pairs: Callable[[Sequence[Group], Sequence[Checkpoint], float, int], list[Pair]]
    # where adapters come from, where none are given: kept on the way of one training; a training
    # for each prompt; one for each task
    collects: Literal["trail", "branches", "tasks"]


def pairing_named(name: str) -> Pairing:
    """
    Raises:
        ConfigError: where no file has that name.
    """
    return cast(Pairing, plugins.load(PAIRINGS, name, "generator.pairing").PAIRING)


def matched(
    groups: Sequence[Group],
    checkpoints: Sequence[Checkpoint],
    belongs: Callable[[int, Group, Checkpoint], bool],
) -> list[Pair]:
    """Every group with the checkpoints that belong to it, in the group's role."""
    return [
        Pair(i, j, group.role)
        for i, group in enumerate(groups)
        for j, checkpoint in enumerate(checkpoints)
        if belongs(i, group, checkpoint)
    ]
