"""Tokens that two vocabularies share, as anchors between their embedding spaces."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from paw.errors import TransferError
from paw.transfer.pairing import Site

BLANK = "▁"  # SentencePiece's


def shared_tokens(source: Any, target: Any) -> list[tuple[int, int]]:
    """Token ids (source, target) of the same bytes, leading blank included; special and
    byte-fallback tokens left out."""
    ours, theirs = _by_bytes(source), _by_bytes(target)
    return [(ours[text], theirs[text]) for text in sorted(ours.keys() & theirs.keys())]


def _by_bytes(tokenizer: Any) -> dict[bytes, int]:
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    bytelevel = not any(token.startswith(BLANK) for token in vocabulary)
    out: dict[bytes, int] = {}
    for token, i in vocabulary.items():
        if i in special or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>|<[^<>]*\d+>", token):
            continue
        if bytelevel:
            if all(c in _alphabet() for c in token):
                out[bytes(_alphabet()[c] for c in token)] = i
        else:
            out[token.replace(BLANK, " ").encode()] = i
    return out


@lru_cache
def _alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others follow
    from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


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
