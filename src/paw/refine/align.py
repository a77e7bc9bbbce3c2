"""What the source finds likely at the places of an answer, in the target's own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from paw.data.tokenise import Encoded, Shares
from paw.data.vocabulary import offsets
from paw.refine.teacher import Places

LEAST = 0.5  # of the probability at a place that the target has tokens for


@dataclass(frozen=True)
class Vocabulary:
    """The target's tokens by their bytes."""

    tokens: Mapping[bytes, int]

    @cached_property
    def texts(self) -> dict[int, bytes]:
        return {token: text for text, token in self.tokens.items()}

    def soft(self, row: Encoded, answer: str, places: Places) -> tuple[Shares, ...]:
        """Of each token of the answer what is learnt in its place: nothing but itself where the
        source begins no token there, or where the target has tokens for too little of what the
        source finds likely."""
        known, starts = dict(places), offsets(row, answer, self.texts)
        rest = [answer.encode()[at:] for at in starts]
        out = [
            self._shares(token, known.get(at, ()), behind)
            for token, at, behind in zip(row.ids[row.start :], starts, rest, strict=False)
        ]
        return (*out, *((),) * (len(row.ids) - row.start - len(out)))

    def _shares(self, token: int, said: tuple[tuple[str, float], ...], behind: bytes) -> Shares:
        """
        Args:
            token: that stands here.
            behind: what the answer goes on with.
        """
        each = [(text.encode(), p) for text, p in said]
        alike = any(text == self.texts[token] for text, _ in each)
        found: dict[int, float] = {}
        for text, p in each:
            # the source says the same by a token that is shorter or longer than this one
            same = not alike and behind.startswith(text)
            mine = token if same else self.tokens.get(text)
            if mine is not None:
                found[mine] = found.get(mine, 0.0) + p
        total = sum(found.values())
        return tuple((t, p / total) for t, p in found.items()) if total >= LEAST else ()
