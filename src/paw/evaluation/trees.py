"""A question's choices as a tree of tokens, so that what they share is computed once.

A tree's nodes are tokens in preorder: a node sees itself and its ancestors, which are the nodes j ≤ i whose subtree has
not ended, i < end[j]; its position is its depth. One rule makes a choice's tokens see exactly what they would see alone,
whatever is shared, and keeps trees that stand in one row apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from paw.data.encode import Encoded, common

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tree:
    """Tokens in preorder, each with its depth, its parent (−1 for a root) and where its subtree ends (exclusive)."""

    ids: tuple[int, ...]
    depth: tuple[int, ...]
    parent: tuple[int, ...]
    end: tuple[int, ...]
    scored: tuple[tuple[int, ...], ...]  # a choice's nodes whose log-probabilities add up to its score

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def reads(self) -> int:
        """Positions that the output projection is needed at."""
        return len({self.parent[n] for nodes in self.scored for n in nodes})


def tree(rows: Sequence[Encoded], skip: int = 0) -> Tree:
    """The prefix tree of a question's choices.

    Args:
        skip: tokens at the front that all rows share and that a cache holds already; less than any row's start.
    """
    ids: list[int] = []
    depth: list[int] = []
    parent: list[int] = []
    end: list[int] = []
    scored: list[tuple[int, ...]] = [()] * len(rows)
    path: list[int] = []  # nodes from the root to the last token of the row before
    before: tuple[int, ...] = ()
    for i in sorted(range(len(rows)), key=lambda i: rows[i].ids):
        tokens = rows[i].ids[skip:]
        shared = common(before, tokens)
        for node in path[shared:]:
            end[node] = len(ids)
        del path[shared:]
        for token in tokens[shared:]:
            parent.append(path[-1] if path else -1)
            depth.append(len(path))
            path.append(len(ids))
            ids.append(token)
            end.append(0)
        scored[i] = tuple(path[rows[i].start - skip :])
        before = tokens
    for node in path:
        end[node] = len(ids)
    return Tree(tuple(ids), tuple(depth), tuple(parent), tuple(end), tuple(scored))


def chain(ids: Sequence[int]) -> Tree:
    """A text without branches, of which only the last token is scored."""
    n = len(ids)
    return Tree(tuple(ids), tuple(range(n)), tuple(range(-1, n - 1)), (n,) * n, ((n - 1,),))


def shared_prefix(questions: Sequence[Sequence[Encoded]]) -> tuple[int, ...]:
    """What every row of every question begins with, at least one token short of any continuation."""
    rows = [r for q in questions for r in q]
    low, high = min(r.ids for r in rows), max(r.ids for r in rows)  # what these share, all between them share
    return low[: min(common(low, high), min(r.start for r in rows) - 1)]


@dataclass(frozen=True)
class Packed:
    """Rows of trees, filled up to one length."""

    ids: torch.Tensor  # (rows × length) int64
    depth: torch.Tensor  # (rows × length)
    end: torch.Tensor  # (rows × length)
    reads: torch.Tensor  # (n × 2) row and place of every position whose prediction is read
    asked: torch.Tensor  # (m × 2) index into reads, and the token whose log-probability is asked there
    sums: list[list[list[int]]]  # by tree and choice: indices into asked


def pack(rows: Sequence[Sequence[Tree]], pad_id: int, device: Any) -> Packed:
    """Trees as tensors; those of one row stand one after the other."""
    import torch

    width = max(sum(map(len, row)) for row in rows)
    ids, depth, end, sums = [], [], [], []
    reads: dict[tuple[int, int], int] = {}
    asked: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        row_ids: list[int] = []
        row_depth: list[int] = []
        row_end: list[int] = []
        for t in row:
            offset, known = len(row_ids), dict[int, int]()
            row_ids += t.ids
            row_depth += t.depth
            row_end += (e + offset for e in t.end)
            for node in sorted({n for nodes in t.scored for n in nodes}):
                known[node] = len(asked)
                asked.append((reads.setdefault((r, t.parent[node] + offset), len(reads)), t.ids[node]))
            sums.append([[known[n] for n in nodes] for nodes in t.scored])
        fill = width - len(row_ids)  # what fills a row sees only itself: no row of the attention is empty
        ids.append(row_ids + [pad_id] * fill)
        depth.append(row_depth + [0] * fill)
        end.append([*row_end, *range(len(row_ids) + 1, width + 1)])
    tensor = partial(torch.tensor, device=device)
    return Packed(tensor(ids), tensor(depth), tensor(end), tensor(list(reads)), tensor(asked), sums)


def visible(packed: Packed, past: int, window: int | None = None) -> torch.Tensor:
    """What each token sees: (rows × 1 × length × past + length), boolean.

    Args:
        past: tokens before all trees, which all may see.
        window: how many positions back a token sees, itself included; None for all.
    """
    import torch

    place = torch.arange(packed.ids.shape[1], device=packed.ids.device)
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < packed.end[:, None, :])
    position = packed.depth + past
    if window is not None:
        seen = seen & (position[:, :, None] - position[:, None, :] < window)
    if not past:
        return seen[:, None]
    old = torch.ones(*position.shape, past, dtype=torch.bool, device=seen.device)
    if window is not None:
        old = position[:, :, None] - torch.arange(past, device=seen.device) < window
    return torch.cat([old, seen], dim=-1)[:, None]
