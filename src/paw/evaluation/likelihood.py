"""The log-likelihood of continuations: what evaluation scores and what training maximises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paw.data.encode import Encoded

if TYPE_CHECKING:
    import torch

MAX_LOGITS = 2**28  # float32 values a batch: one GiB


def token_logprobs(model: Any, rows: Sequence[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of each row's continuation tokens.

    Rows are filled on the left, so that all continuations end at the end and the model projects only these positions;
    it does so itself, with whatever its family does to logits (caps, scales).

    Returns:
        Two tensors (rows × longest continuation): log-probabilities in float32, zero where a row is shorter; and the
        mask of what counts.
    """
    import torch

    device = next(model.parameters()).device
    width = max(len(r.ids) for r in rows)
    keep = max(len(r.ids) - r.start for r in rows)
    ids = torch.tensor([[pad_id] * (width - len(r.ids)) + list(r.ids) for r in rows], device=device)
    lengths = torch.tensor([len(r.ids) for r in rows], device=device)
    counts = torch.tensor([len(r.ids) - r.start for r in rows], device=device)
    place = torch.arange(width, device=device)
    attention = (place >= width - lengths[:, None]).long()
    logits = model(
        input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(-1) - 1).clamp_min(0),
        logits_to_keep=keep + 1, use_cache=False,
    ).logits  # fmt: skip
    logits = logits[:, -(keep + 1) : -1].float()
    gold = ids[:, -keep:]
    found = logits.gather(-1, gold[..., None])[..., 0] - logits.logsumexp(-1)
    mask = place[-keep:] >= width - counts[:, None]
    return found.masked_fill(~mask, 0.0), mask


def batches(rows: Sequence[Encoded], size: int, vocabulary: int) -> list[list[int]]:
    """Indices of rows in batches of like length, the longest first, each within `size` and MAX_LOGITS."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    out: list[list[int]] = []
    keep = 0
    for i in order:
        keep = max(keep, len(rows[i].ids) - rows[i].start + 1)
        if not out or len(out[-1]) >= size or (len(out[-1]) + 1) * keep * vocabulary > MAX_LOGITS:
            out.append([])
            keep = len(rows[i].ids) - rows[i].start + 1
        out[-1].append(i)
    return out
