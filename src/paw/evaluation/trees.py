"""A question's choices as a tree of tokens, so that what they share is computed once.

A tree's nodes are tokens in preorder: a node sees itself and its ancestors, which are the nodes
j ≤ i whose subtree has not ended, i < end[j]; its position is its depth. One rule makes a choice's
tokens see exactly what they would see alone, whatever is shared, and keeps trees that stand in one
row apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from paw.data.tokenise import Encoded, common

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tree:
    """Tokens in preorder, each with its depth and where its subtree ends (exclusive).

    A choice's last token is asked for, but nothing is read after it: it is a node only where
    another choice goes on.
    """

    ids: tuple[int, ...]
    depth: tuple[int, ...]
    end: tuple[int, ...]
    # by choice: at which node which next token's log-probability counts
    scored: tuple[tuple[tuple[int, int], ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def reads(self) -> int:
        """Positions that the output projection is needed at."""
        return len({node for pairs in self.scored for node, _ in pairs})

    def path(self, node: int) -> list[int]:
        """The nodes from the root to a node."""
        return [j for j in range(node + 1) if node < self.end[j]]


def tree(rows: Sequence[Encoded], skip: int = 0) -> Tree:
    """The prefix tree of a question's choices.

    Args:
        skip: tokens at the front that all rows share and that a cache holds already; less than any
            row's start.
    """
    ids: list[int] = []
    depth: list[int] = []
    end: list[int] = []
    scored: list[tuple[tuple[int, int], ...]] = [()] * len(rows)
    path: list[int] = []  # nodes from the root to the last token of the row before
    before: tuple[int, ...] = ()
    for i in sorted(range(len(rows)), key=lambda i: rows[i].ids):
        tokens = rows[i].ids[skip:-1]
        shared = common(before, tokens)
        for node in path[shared:]:
            end[node] = len(ids)
        del path[shared:]
        for token in tokens[shared:]:
            depth.append(len(path))
            path.append(len(ids))
            ids.append(token)
            end.append(0)
        first = rows[i].start - skip
        scored[i] = tuple(zip(path[first - 1 :], rows[i].ids[rows[i].start :], strict=True))
        before = tokens
    for node in path:
        end[node] = len(ids)
    return Tree(tuple(ids), tuple(depth), tuple(end), tuple(scored))


def chain(ids: Sequence[int]) -> Tree:
    """A text without branches, read at its end only."""
    n = len(ids)
    return Tree(tuple(ids), tuple(range(n)), (n,) * n, (((n - 1, 0),),))


def shared_prefix(questions: Sequence[Sequence[Encoded]]) -> tuple[int, ...]:
    """What all rows of all questions begin with, at least a token short of any continuation."""
    rows = [r for q in questions for r in q]
    # what these share, all between them share
    low, high = min(r.ids for r in rows), max(r.ids for r in rows)
    return low[: min(common(low, high), min(r.start for r in rows) - 1)]


@dataclass(frozen=True)
class Packed:
    """Rows of trees, filled up to one length."""

    ids: torch.Tensor  # (rows × length) int64
    depth: torch.Tensor  # (rows × length)
    end: torch.Tensor  # (rows × length)
    reads: torch.Tensor  # (n × 2) row and place of every position whose prediction is read
    asked: torch.Tensor  # (m × 2) index into reads, and the token that is asked for there
    sums: list[list[list[int]]]  # by tree and choice: indices into asked


def pack(rows: Sequence[Sequence[Tree]], pad_id: int, device: Any) -> Packed:
    """Trees as tensors; those of one row stand one after the other."""
    import torch

    width = max(sum(map(len, row)) for row in rows)
    ids, depth, end = [], [], []
    sums: list[list[list[int]]] = []
    reads: dict[tuple[int, int], int] = {}
    asked: dict[tuple[int, int], int] = {}
    for r, row in enumerate(rows):
        row_ids, row_depth, row_end = list[int](), list[int](), list[int]()
        for t in row:
            offset = len(row_ids)
            row_ids += t.ids
            row_depth += t.depth
            row_end += (e + offset for e in t.end)
            sums.append([])
            for pairs in t.scored:
                at = [reads.setdefault((r, node + offset), len(reads)) for node, _ in pairs]
                found = [(place, token) for place, (_, token) in zip(at, pairs, strict=True)]
                sums[-1].append([asked.setdefault(one, len(asked)) for one in found])
        # what fills a row sees only itself: no row of the attention is empty
        fill = width - len(row_ids)
        ids.append(row_ids + [pad_id] * fill)
        depth.append(row_depth + [0] * fill)
        end.append([*row_end, *range(len(row_ids) + 1, width + 1)])
    tensor = partial(torch.tensor, device=device)
    return Packed(
        tensor(ids), tensor(depth), tensor(end), tensor(list(reads)), tensor(list(asked)), sums
    )


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
    return behind_past(seen, position, past, window)


def behind_past(
    seen: torch.Tensor, position: torch.Tensor, past: int, window: int | None
) -> torch.Tensor:
    """What is seen (rows × length × keys) with a past before it, as attention wants it:
    rows × 1 × length × past + keys.

    Args:
        position: of the tokens that look (rows × length), the past counted.
    """
    import torch

    old = torch.ones(*position.shape, past, dtype=torch.bool, device=seen.device)
    if window is not None:
        old = position[:, :, None] - torch.arange(past, device=seen.device) < window
    return torch.cat([old, seen], dim=-1)[:, None]
