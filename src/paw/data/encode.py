"""Examples as tokens, cut where the context ends, equally for training and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paw.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context with its continuation, which starts at `start`."""

    ids: tuple[int, ...]
    start: int


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], chat: bool) -> list[Encoded]:
    """Contexts with continuations as tokens. The whole is encoded and cut at the longest common prefix with the context
    alone, so that merges across the boundary count as continuation, as in the harness.

    Raises:
        DataError: if chat is asked of a tokenizer without a template, or a continuation is empty.
    """
    if chat:
        if not tokenizer.chat_template:
            raise DataError("dataset.chat: this model's tokenizer has no chat template. Set dataset.chat=false.")
        pairs = [(_as_chat(tokenizer, context), continuation.lstrip(" ")) for context, continuation in pairs]
    contexts = sorted({c for c, _ in pairs})
    special = not chat  # a template writes its own special tokens
    alone = dict(zip(contexts, tokenizer(contexts, add_special_tokens=special).input_ids, strict=True))
    whole = tokenizer([c + x for c, x in pairs], add_special_tokens=special).input_ids
    out = []
    for (context, continuation), ids in zip(pairs, whole, strict=True):
        start = common(alone[context], ids)
        ids = _open(tokenizer, ids, continuation)
        if start >= len(ids) or not continuation.strip():
            raise DataError(f"an empty choice after {context[-60:]!r}: there is nothing to score.")
        out.append(Encoded(tuple(ids), max(start, 1)))
    return out


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def encode_prompts(tokenizer: Any, contexts: Sequence[str], chat: bool) -> list[tuple[int, ...]]:
    """Contexts alone as tokens, to be continued."""
    if chat:
        contexts = [_as_chat(tokenizer, context) for context in contexts]
    found = tokenizer(list(contexts), add_special_tokens=not chat).input_ids
    return [tuple(_open(tokenizer, ids, context)) for context, ids in zip(contexts, found, strict=True)]


def _open(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Tokens without the end that some tokenizers close every text with."""
    end = tokenizer.eos_token_id
    return ids[:-1] if end is not None and ids[-1] == end and not text.endswith(tokenizer.eos_token) else ids


def _as_chat(tokenizer: Any, context: str) -> str:
    turns = [{"role": "user", "content": context}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of different length as one int64 tensor, filled on the right."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*r, *[value] * (width - len(r))] for r in rows])
