"""Which examples a step sees, in which micro-batches: a function of the seed and the step's number
alone.

So a stopped training goes on with the very next example, several processes split the steps of one,
and halving a micro-batch changes nothing of what a step is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paw.data.encode import Rows
from paw.data.tokenise import Encoded
from paw.training.objectives import Objective

BUCKET = 32  # steps whose examples are sorted by length together, where rows are filled up


class Micro:
    """Rows of one forward pass, and the factor that makes the sum over them their part of the
    step's mean.

    Not a dataclass: torch's FSDP searches those for tensors to convert, and refuses frozen ones.

    Args:
        step: its number, from 0.
        tokens: of the whole step, in all processes.
    """

    __slots__ = ("rows", "step", "tokens", "weight")

    def __init__(self, rows: list[Encoded], weight: float, step: int, tokens: int) -> None:
        self.rows, self.weight, self.step, self.tokens = rows, weight, step, tokens


@dataclass(frozen=True)
class Share:
    """This process among those that train, and the micro-batches that each of its steps is computed
    in."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


def order(count: int, seed: int, epoch: int) -> list[int]:
    """A new order every epoch."""
    import torch

    draw = torch.Generator().manual_seed(seed + epoch)
    found: list[int] = torch.randperm(count, generator=draw).tolist()
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
        # what is left over is left to chance, not the shortest
        shuffled = order(count, seed, epoch)[: steps * size]
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
    rows: Sequence[Encoded] | Rows,
    picked: Sequence[int],
    share: Share,
    objective: Objective,
    step: int,
) -> list[Micro]:
    """This process's part of one step. The mean over its micro-batches is taken where it trains (by
    DeepSpeed itself there), and gradients are averaged over processes: both are multiplied in
    again, so that every counted token or example of the step weighs the same."""
    whole = [rows[i] for i in picked]
    total = sum(map(objective.count, whole))
    mine = sorted(whole[share.rank :: share.world], key=lambda r: -len(r.ids))
    weight, tokens = share.accumulate * share.world / total, sum(len(r.ids) for r in whole)
    return [
        Micro(part, weight, step, tokens)
        for part in _parts(mine, share.accumulate, objective.packed)
    ]


def _parts(rows: list[Encoded], count: int, packed: bool) -> list[list[Encoded]]:
    """Rows, longest first, in so many parts: of like tokens where they are packed, of like lengths
    where they are filled up."""
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


def training_steps(
    rows: Rows, objective: Objective, size: int, seed: int, share: Share, first: int
) -> Iterator[list[Micro]]:
    """This process's micro-batches of step after step, without end.

    Args:
        size: examples a step, in all processes.
        first: the step to begin with, from 0.
    """
    steps = step_rows(rows.lengths, size, seed, not objective.packed)
    for step, picked in itertools.islice(enumerate(steps), first, None):
        yield micro_batches(rows, picked, share, objective, step)


@dataclass(frozen=True)
class Validation:
    """All rows once, in batches of like lengths. Each process takes as many batches as any other,
    or sharded models would wait for each other; what it must take twice weighs nothing."""

    batches: list[Micro]  # this process's
    counted: float  # what the rows of all processes weigh

    @classmethod
    def of(cls, rows: Rows, objective: Objective, size: int, share: Share) -> Validation:
        by_length = sorted(range(len(rows)), key=lambda i: -rows.lengths[i])
        found = [[rows[i] for i in by_length[at : at + size]] for at in range(0, len(rows), size)]
        mine = [Micro(batch, 1.0, 0, 0) for batch in found[share.rank :: share.world]]
        more = -(-len(found) // share.world) - len(mine)
        counted = sum(objective.count(row) for batch in found for row in batch)
        return cls(mine + [Micro(found[0], 0.0, 0, 0)] * more, counted)
