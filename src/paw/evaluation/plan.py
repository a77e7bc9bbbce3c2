"""Questions as batches, planned before any of them runs: what a batch is depends neither on devices
nor on what ran before."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paw.data.tokenise import Encoded
from paw.evaluation.trees import Tree, shared_prefix, tree

WORTH = 48  # shared tokens from which a cache pays
ROW = 128  # tokens of a row: short questions stand together in one, so that little is filled up
TOKENS = {"cpu": 1024, "cuda": 16384}  # of a batch
LOGITS = {"cpu": 2**26, "cuda": 2**28}  # float32 values a batch: a quarter of a GiB, and one


@dataclass(frozen=True)
class Scoring:
    """Rows of trees, to be scored: a list of sums a tree."""

    rows: tuple[tuple[Tree, ...], ...]

    def halves(self) -> list[Scoring]:
        rows = self.rows if len(self.rows) > 1 else tuple((t,) for t in self.rows[0])
        half = len(rows) // 2
        return [Scoring(rows[:half]), Scoring(rows[half:])] if half else []

    def tokens(self) -> int:
        return len(self.rows) * max(sum(map(len, row)) for row in self.rows)

    def __len__(self) -> int:
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Writing:
    """Prompts (after the prefix), to be continued: a list of tokens a prompt. Greedily, or at a
    temperature; what is drawn for a prompt follows from its own seed, whatever batch it is in."""

    prompts: tuple[tuple[int, ...], ...]
    limit: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    seeds: tuple[int, ...] = ()  # of each prompt, where there is a temperature

    def halves(self) -> list[Writing]:
        half = len(self.prompts) // 2
        cuts = (slice(half), slice(half, None)) if half else ()
        return [replace(self, prompts=self.prompts[c], seeds=self.seeds[c]) for c in cuts]

    def tokens(self) -> int:
        return len(self.prompts) * (max(map(len, self.prompts)) + self.limit)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Likeliest:
    """Rows of which the `top` likeliest tokens are wanted, at each token of their continuations: a
    list a row of pairs (token, probability), for each such token."""

    rows: tuple[Encoded, ...]
    top: int

    def halves(self) -> list[Likeliest]:
        half = len(self.rows) // 2
        cuts = (slice(half), slice(half, None)) if half else ()
        return [replace(self, rows=self.rows[c]) for c in cuts]

    def tokens(self) -> int:
        return len(self.rows) * max(len(r.ids) for r in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


Batch = Scoring | Writing | Likeliest


def prefix_of(questions: Sequence[Sequence[Encoded]]) -> tuple[int, ...]:
    """What is worth keeping in a cache: few shots, a long system prompt; nothing if it is short."""
    found = shared_prefix(questions) if len(questions) > 1 else ()
    return found if len(found) >= WORTH else ()


def plan_scoring(
    questions: Sequence[Sequence[Encoded]], prefix: int, tokens: int, reads: int
) -> tuple[list[Scoring], list[int]]:
    """Questions as batches of full rows, and the order in which their scores will come.

    Args:
        prefix: tokens at the front of every row that a cache holds.
        tokens, reads: at most so many tokens and read positions a batch; one question alone is
            never refused.
    """
    trees = [tree(q, prefix) for q in questions]
    batches: list[list[list[int]]] = []
    width = read = 0
    for row in _rows([len(t) for t in trees], max(ROW, *map(len, trees))):
        length, needs = sum(len(trees[i]) for i in row), sum(trees[i].reads for i in row)
        width = max(width, length)
        if not batches or (len(batches[-1]) + 1) * width > tokens or read + needs > reads:
            batches.append([])
            width, read = length, 0
        batches[-1].append(row)
        read += needs
    plan = [Scoring(tuple(tuple(trees[i] for i in row) for row in batch)) for batch in batches]
    return plan, [i for batch in batches for row in batch for i in row]


def _rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Items in rows of at most `most`, the longest rows first: each, from the longest on, goes
    where least is left over (best-fit decreasing)."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # what is left of each row, in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(left, (lengths[i], -1))
        room, row = left.pop(at) if at < len(left) else (most, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(left, (room - lengths[i], row))
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row))


def plan_likeliest(
    rows: Sequence[Encoded], tokens: int, reads: int, top: int
) -> tuple[list[Likeliest], list[int]]:
    """Rows as batches of like length, and the order in which their results will come.

    Args:
        tokens, reads: at most so many tokens and read positions a batch, but for a single row.
        top: tokens wanted at each position.
    """
    lengths = [len(row.ids) for row in rows]
    batches = _alike(
        lengths, tokens, [n - r.start for n, r in zip(lengths, rows, strict=True)], reads
    )
    plan = [Likeliest(tuple(rows[i] for i in batch), top) for batch in batches]
    return plan, [i for batch in batches for i in batch]


def plan_writing(
    prompts: Sequence[tuple[int, ...]],
    prefix: int,
    tokens: int,
    limit: int,
    stop: Sequence[str],
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> tuple[list[Writing], list[int]]:
    """Prompts as batches of like length, and the order in which their continuations will come.

    Args:
        temperature, seeds: 0 writes greedily; else what is drawn for each prompt has its seed.
    """
    lengths = [len(prompt) + limit for prompt in prompts]
    batches = _alike(lengths, tokens, [1] * len(prompts), len(prompts))
    plan = [
        Writing(
            tuple(prompts[i][prefix:] for i in batch),
            limit,
            tuple(stop),
            temperature,
            tuple(seeds[i] for i in batch) if temperature else (),
        )
        for batch in batches
    ]
    return plan, [i for batch in batches for i in batch]


def _alike(
    lengths: Sequence[int], tokens: int, needs: Sequence[int], reads: int
) -> list[list[int]]:
    """Items in batches of like length, the longest first.

    Args:
        tokens, reads: at most so many tokens, all filled up to the longest, and as many of `needs`
            a batch, but for a single item.
    """
    batches: list[list[int]] = []
    read = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens
        if not batches or full or read + needs[i] > reads:
            batches.append([])
            read = 0
        batches[-1].append(i)
        read += needs[i]
    return batches
