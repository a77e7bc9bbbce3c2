"""What is minimised: the negative log-likelihood of answers, or the error of a classifier. Each is
a sum over what it counts, so that micro-batches and processes add up to exactly the mean of the
whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from paw.data.tokenise import Encoded

if TYPE_CHECKING:
    import torch


class Objective(Protocol):
    @property
    def packed(self) -> bool:
        """Whether rows stand in one, so that their lengths need not be alike."""

    def count(self, row: Encoded) -> float:
        """What a row weighs."""

    def total(self, model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
        """The sum over all that the rows weigh: a float32 scalar."""


@dataclass(frozen=True)
class Answers:
    """Nats of the answers' tokens, each as much as its answer weighs; where a row has shares for a
    token, the cross-entropy to these."""

    pad_id: int
    packed: bool

    def count(self, row: Encoded) -> float:
        if not row.soft:
            return row.weight * (len(row.ids) - row.start)
        return row.weight * sum(sum(p for _, p in place) if place else 1.0 for place in row.soft)

    def total(self, model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        from paw.evaluation.likelihood import label_logits

        logits, labels = label_logits(model, rows, self.pad_id, self.packed)
        soft = any(row.soft for row in rows)
        if not soft and all(row.weight == 1 for row in rows):
            return cross_entropy(logits, labels, reduction="sum")
        weights = [row.weight for row in rows for _ in range(row.start, len(row.ids))]
        if soft:
            nats = shared_nats(logits, labels, rows)
        else:
            nats = cross_entropy(logits, labels, reduction="none")
        return (nats * torch.tensor(weights, device=nats.device)).sum()


def shared_nats(
    logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Encoded]
) -> torch.Tensor:
    """The cross-entropy of each continuation token (n) to what rows have in its place, as much as
    that adds up to.

    Args:
        logits: n × vocabulary.
        labels: the tokens themselves (n), learnt where a row has nothing in their place.
    """
    import torch

    given = [shares for row in rows for shares in row.shares]
    each = [s or ((label, 1.0),) for s, label in zip(given, labels.tolist(), strict=True)]
    width = max(map(len, each))
    tokens = torch.tensor([[t for t, _ in s] + [0] * (width - len(s)) for s in each])
    shares = torch.tensor([[p for _, p in s] + [0.0] * (width - len(s)) for s in each])
    picked = logits.gather(-1, tokens.to(logits.device))
    shares = shares.to(logits.device)
    return logits.logsumexp(-1) * shares.sum(-1) - (picked * shares).sum(-1)


@dataclass(frozen=True)
class Classes:
    """Nats of the right classes; or squared errors, where there is a value to be found."""

    pad_id: int
    regression: bool
    pairs: bool  # the model tells a second sentence by token types
    packed: bool = False  # a head reads one place of a row

    def count(self, row: Encoded) -> float:
        return 1

    def total(self, model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
        import torch
        from torch.nn.functional import cross_entropy, mse_loss

        from paw.evaluation.classify import class_logits

        logits = class_logits(model, rows, self.pad_id, self.pairs)
        labels = torch.tensor([r.label for r in rows], device=logits.device)
        if self.regression:
            return mse_loss(logits[:, 0], labels, reduction="sum")
        return cross_entropy(logits, labels.long(), reduction="sum")
