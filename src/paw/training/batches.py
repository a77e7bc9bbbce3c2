"""Which examples a step sees, in which micro-batches: a function of the seed and the step's number alone.

So a stopped training goes on with the very next example, several processes split the steps of one, and halving a micro-batch
changes nothing of what a step is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from paw.data.encode import Rows
from paw.data.tokenise import Encoded
from paw.training.objectives import Objective

BUCKET = 32  # steps whose examples are sorted by length together, where rows are filled up


class Micro:
    """Rows of one forward pass, and the factor that makes the sum over them their part of the step's mean.

    Not a dataclass: Lightning's sharded strategies search those for tensors to convert, and refuse frozen ones.

    Args:
        step: its number, from 0.
        tokens: of the whole step, in all processes.
    """

    __slots__ = ("rows", "step", "tokens", "weight")

    def __init__(self, rows: list[Encoded], weight: float, step: int, tokens: int) -> None:
        self.rows, self.weight, self.step, self.tokens = rows, weight, step, tokens


@dataclass(frozen=True)
class Share:
    """This process among those that train, and the micro-batches that each of its steps is computed in."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


def order(count: int, seed: int, epoch: int) -> list[int]:
    """A new order every epoch."""
    found: list[int] = torch.randperm(
        count, generator=torch.Generator().manual_seed(seed + epoch)
    ).tolist()
    return found


def per_epoch(count: int, size: int) -> int:
    """Steps in one pass over the data: whole batches only, so that every step weighs the same."""
    return max(1, count // size)


def step_rows(lengths: Sequence[int], size: int, seed: int, bucketed: bool) -> Iterator[list[int]]:
    """The examples of step after step, without end.

    Args:
        size: examples a step, in all processes; at most as many as there are.
        bucketed: steps of like lengths, in random order, so that little is filled up.
    """
    count, steps = len(lengths), per_epoch(len(lengths), size)
    for epoch in itertools.count():
        shuffled = order(count, seed, epoch)[
            : steps * size
        ]  # what is left over is left to chance, not the shortest
        if bucketed:
            span = BUCKET * size
            shuffled = [
                i
                for at in range(0, len(shuffled), span)
                for i in sorted(shuffled[at : at + span], key=lambda i: -lengths[i])
            ]
        batches = [shuffled[at * size : (at + 1) * size] for at in range(steps)]
        if bucketed:
            random.Random(seed + epoch).shuffle(batches)
        yield from batches


def micro_batches(
    rows: Sequence[Encoded], picked: Sequence[int], share: Share, objective: Objective, step: int
) -> list[Micro]:
    """This process's part of one step. Lightning divides by the micro-batches, and gradients are averaged over processes:
    both are multiplied in again, so that every counted token or example of the step weighs the same."""
    whole = [rows[i] for i in picked]
    total = sum(map(objective.count, whole))
    mine = sorted(whole[share.rank :: share.world], key=lambda r: -len(r.ids))
    weight, tokens = share.accumulate * share.world / total, sum(len(r.ids) for r in whole)
    return [
        Micro(part, weight, step, tokens)
        for part in _parts(mine, share.accumulate, objective.packed)
    ]


def _parts(rows: list[Encoded], count: int, packed: bool) -> list[list[Encoded]]:
    """Rows, longest first, in so many parts: of like tokens where they are packed, of like lengths where they are filled up."""
    if not packed:
        cuts = [round(i * len(rows) / count) for i in range(count + 1)]
        return [rows[low:high] for low, high in itertools.pairwise(cuts)]
    parts: list[list[Encoded]] = [[] for _ in range(count)]
    sizes = [0] * count
    for row in rows:  # longest first to the smallest part
        least = sizes.index(min(sizes))
        parts[least].append(row)
        sizes[least] += len(row.ids)
    return parts


class Steps(IterableDataset[Micro]):
    def __init__(
        self, rows: Rows, objective: Objective, size: int, seed: int, share: Share, first: int
    ) -> None:
        self._all = (rows, objective, size, seed, share, first)

    def __iter__(self) -> Iterator[Micro]:
        rows, objective, size, seed, share, first = self._all
        steps = step_rows(rows.lengths, size, seed, not objective.packed)
        for step, picked in itertools.islice(enumerate(steps), first, None):
            yield from micro_batches(rows, picked, share, objective, step)  # type: ignore[arg-type]


class Validation(IterableDataset[Micro]):
    """All rows once, in batches of like lengths. Each process takes as many batches as any other, or sharded models would
    wait for each other; what it must take twice weighs nothing."""

    def __init__(self, rows: Rows, objective: Objective, size: int, share: Share) -> None:
        by_length = sorted(range(len(rows)), key=lambda i: -rows.lengths[i])
        found = [[rows[i] for i in by_length[at : at + size]] for at in range(0, len(rows), size)]
        self.counted = sum(objective.count(r) for batch in found for r in batch)
        mine = [Micro(batch, 1.0, 0, 0) for batch in found[share.rank :: share.world]]
        self._mine = mine + [Micro(found[0], 0.0, 0, 0)] * (
            -(-len(found) // share.world) - len(mine)
        )

    def __iter__(self) -> Iterator[Micro]:
        return iter(self._mine)


def loader(found: IterableDataset[Micro]) -> DataLoader[Any]:
    return DataLoader(found, batch_size=None, num_workers=0)
