"""Tokens that two vocabularies share as anchors between their embedding spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from paw.errors import TransferError
from paw.transfer.pairing import Site


def embedding_site(source: Tensor, target: Tensor, shared: list[tuple[int, int]]) -> Site:
    """Both embeddings (vocabulary×d) at shared tokens, centred, every token of weight
    1/(‖e_s‖‖e_t‖): rare tokens' short or long vectors count like others. Tokens whose embedding was
    hardly trained (norm under a hundredth of the median) drop out.

    Raises:
        TransferError: if fewer tokens are shared than would place one direction.
    """
    if len(shared) < 2:
        raise TransferError(
            "transfer=embedding: the two tokenizers share no token. Use a method that looks at "
            "text, such as procrustes."
        )
    rows = torch.tensor(shared)
    e_s, e_t = source[rows[:, 0]], target[rows[:, 1]]
    trained = torch.ones(len(rows), dtype=torch.bool)
    for e in (e_s, e_t):
        norms = e.norm(dim=1).cpu()
        trained &= norms > norms.median() / 100
    e_s, e_t = (e[trained] - e[trained].mean(0) for e in (e_s, e_t))
    e_s, e_t = (e / e.norm(dim=1, keepdim=True).clamp_min(1e-30) for e in (e_s, e_t))
    n = len(e_s)
    return Site(e_s.T @ e_t / n, e_s.T @ e_s / n, e_t.T @ e_t / n, e_s[:0], e_t[:0])
