"""Attention inside each of several examples that stand in one row, and nowhere else.

Every projection of a packed row is computed at once; only attention is computed example by example.
So nothing is filled up, no mask of all positions with all is made, and contamination is not masked
away but never computed: an example's queries meet its own keys only. Masks that are rebuilt from
restarted positions (as DataCollatorWithFlattening leaves to the model) depend on a cache being off,
no mask being given and on the implementation that is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from paw.data.tokenise import Encoded
from paw.models.load import ordinary_attention, out_of_memory

if TYPE_CHECKING:
    import torch

NAME = "paw_segments"


def use(model: Any) -> bool:
    """Sets the model's attention to this one; False, and nothing changed, where the model has other
    kinds of layers."""
    from transformers import AttentionInterface

    if not ordinary_attention(model):
        return False
    AttentionInterface.register(NAME, attend)
    model.config.get_text_config()._attn_implementation = NAME
    model.config._attn_implementation = NAME
    return True


def undo(model: Any) -> None:
    """Back to the library's own attention."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    name = "eager" if capped else "sdpa"
    model.config.get_text_config()._attn_implementation = name
    model.config._attn_implementation = name


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within segments.

    Args:
        query, key, value: (1 × heads × tokens × head size), key and value perhaps with fewer heads.
        segments: the examples' lengths, which add up to tokens; one example where it is not given.

    Returns:
        (1 × tokens × heads × head size), in the library's form.
    """
    import torch

    parts = []
    lengths = segments or [query.shape[2]]  # sorted: those of one length are computed together
    alike = [(length, sum(1 for _ in rows)) for length, rows in groupby(lengths)]
    sizes = [length * n for length, n in alike]
    split = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    for (length, n), *qkv in zip(alike, *split, strict=True):
        q, k, v = (x.reshape(x.shape[1], n, length, -1).transpose(0, 1) for x in qkv)
        # n × heads × length × size
        found = _one(q, k, v, scaling, dropout, sliding_window, softcap)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    n, grouped = q.shape[2], q.shape[1] != k.shape[1]
    seen = None
    if softcap is not None or (window is not None and n > window):
        place = torch.arange(n, device=q.device)
        seen = place[:, None] >= place
        if window is not None:
            seen &= place[:, None] - place < window
    if softcap is None:
        return scaled_dot_product_attention(
            q, k, v, seen, dropout, is_causal=seen is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    assert seen is not None
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


def agrees(model: Any, rows: Sequence[Encoded], pad_id: int, slack: float) -> bool:
    """Whether a few rows packed have the log-probabilities that they have one by one: packing is
    tried before it is trusted.

    Args:
        slack: the largest difference of a token's log-probability that is rounding (nats).
    """
    import torch

    from paw.evaluation.likelihood import label_logprobs

    with torch.no_grad():
        try:
            together = label_logprobs(model, rows, pad_id, packed=True)
        except (TypeError, ValueError, RuntimeError) as e:
            if out_of_memory(e):
                raise
            return False
        undo(model)
        alone = torch.cat([label_logprobs(model, [row], pad_id) for row in rows])
        use(model)
    return bool((together - alone).abs().max() <= slack)
