"""The log-likelihood of continuations: what evaluation scores and what training maximises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paw.data.encode import Encoded

if TYPE_CHECKING:
    import torch


@contextmanager
def projecting(model: Any, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, only the hidden states that `pick` takes (rows × places × d to n × d) reach the output projection."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (pick(args[0])[None],))
    try:
        yield
    finally:
        hook.remove()


def token_logprobs(model: Any, rows: Sequence[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of each row's continuation tokens.

    Rows are filled on the left, so that all continuations end at the end. Only the positions that predict a scored token
    reach the output projection: they are picked from its input, and the model does to their logits whatever its family
    does (caps, scales). With a large vocabulary the projection is most of the work.

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
    mask = place[-keep:] >= width - counts[:, None]

    # a token is predicted one position before it
    with projecting(model, lambda hidden: hidden[:, -(keep + 1) : -1][mask]):
        logits = (
            model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=(attention.cumsum(-1) - 1).clamp_min(0),
                logits_to_keep=keep + 1,
                use_cache=False,
            )
            .logits[0]
            .float()
        )
    found = logits.gather(-1, ids[:, -keep:][mask][:, None])[:, 0] - logits.logsumexp(-1)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, found), mask
