"""The log-likelihood of continuations: what evaluation scores and what training maximises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from paw.data.tokenise import Encoded, pad

if TYPE_CHECKING:
    import torch


@contextmanager
def projecting(model: Any, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, only the hidden states that `pick` takes (rows × places × d to n × d) reach the
    output projection."""
    projection = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(lambda _, args: (pick(args[0])[None],))
    try:
        yield
    finally:
        hook.remove()


def picked(hidden: torch.Tensor, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Hidden states (n × d) of rows and places; of a model that is spread over devices they are
    elsewhere than what was asked."""
    return hidden[row.to(hidden.device), place.to(hidden.device)]


def label_logprobs(
    model: Any, rows: Sequence[Encoded], pad_id: int, packed: bool = False
) -> torch.Tensor:
    """Log-probabilities of all continuation tokens, row after row: one float32 each."""
    logits, labels = label_logits(model, rows, pad_id, packed)
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def label_logits(
    model: Any, rows: Sequence[Encoded], pad_id: int, packed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the continuation tokens (n × vocabulary, float32), row after row, and
    those tokens (n).

    Only the positions that predict one reach the output projection: they are picked from its
    input, and the model does to their logits whatever its family does (caps, scales). With a large
    vocabulary the projection is most of the work.

    Args:
        packed: put all rows into one, each seen only by itself (`paw.training.packing`), instead of
            filling them up on the right. Virtual tokens of prefix, prompt and p-tuning stand before
            a row, so those must be filled up.
    """
    import torch

    device = next(model.parameters()).device
    lengths = [len(r.ids) for r in rows]
    if packed:
        ids = torch.tensor([[token for r in rows for token in r.ids]], device=device)
        more: dict[str, Any] = {
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
            "segments": tuple(lengths),
        }
        corners = [(0, begin) for begin in (0, *accumulate(lengths[:-1]))]
    else:
        ids = pad([r.ids for r in rows], pad_id).to(device)
        more = {"attention_mask": pad([[1] * n for n in lengths], 0).to(device)}
        corners = [(i, 0) for i in range(len(rows))]
    # a token is predicted one position before it
    places = [
        (i, begin + n - 1)
        for (i, begin), r in zip(corners, rows, strict=True)
        for n in range(r.start, len(r.ids))
    ]
    row, place = torch.tensor(places, device=device).unbind(-1)
    width = ids.shape[1]
    # virtual tokens may stand before
    with projecting(model, lambda hidden: picked(hidden, row, hidden.shape[1] - width + place)):
        logits = model(input_ids=ids, use_cache=False, **more).logits[0].float()
    return logits, ids[row, place + 1]
