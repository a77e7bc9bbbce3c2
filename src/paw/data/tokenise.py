"""Examples as tokens, cut where the context ends, equally for training and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paw.data.example import Turns
from paw.errors import DataError

if TYPE_CHECKING:
    import torch


Shares = tuple[tuple[int, float], ...]  # tokens, and how much each counts


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context with its continuation, which starts at `start`; or of a text with its
    class or value."""

    ids: tuple[int, ...]
    start: int
    label: float = 0.0
    weight: float = 1.0  # of each token of the continuation, in training
    # Of each token of the continuation what is learnt in its place: tokens with their shares, which
    # add up to what the place counts; of none itself, which counts 1. Empty: of all tokens
    # themselves.
    soft: tuple[Shares, ...] = ()

    @property
    def shares(self) -> tuple[Shares, ...]:
        """`soft`, with nothing for each token where it is empty."""
        return self.soft or ((),) * (len(self.ids) - self.start)


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str | Turns, str]], chat: bool, close: bool = False
) -> list[Encoded]:
    """Contexts with continuations as tokens. The whole is encoded and cut at the longest common
    prefix with the context alone, so that merges across the boundary count as continuation, as in
    lm-evaluation-harness.

    Args:
        chat: put contexts into the model's own chat template. Conversations are, in any case.
        close: end the continuation as the model ends a text or its turn, so that training teaches
            it to stop.

    Raises:
        DataError: if a template is needed and the tokenizer has none, or a continuation is empty.
    """
    texts = [_texts(tokenizer, before, after, chat, close) for before, after in pairs]
    contexts = sorted({(c, plain) for c, _, plain in texts})
    alone: dict[tuple[str, bool], list[int]] = {}
    whole: list[list[int]] = [[]] * len(texts)
    for special in (True, False):  # a template writes its own special tokens
        mine = [c for c, plain in contexts if plain == special]
        rows = [i for i, (_, _, plain) in enumerate(texts) if plain == special]
        if rows:
            ids = tokenizer(mine, add_special_tokens=special).input_ids
            alone |= {(c, special): found for c, found in zip(mine, ids, strict=True)}
            both = [texts[i][0] + texts[i][1] for i in rows]
            ids = tokenizer(both, add_special_tokens=special).input_ids
            for i, found in zip(rows, ids, strict=True):
                whole[i] = found
    out = []
    for (context, continuation, plain), ids in zip(texts, whole, strict=True):
        start = common(alone[context, plain], ids)
        ids = _open(tokenizer, ids, continuation)
        if start >= len(ids) or not continuation.strip():
            raise DataError(f"an empty choice after {context[-60:]!r}: there is nothing to score.")
        if close and plain and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        out.append(Encoded(tuple(ids), max(start, 1)))
    return out


def encode_texts(tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> list[Encoded]:
    """One sentence or a pair as an encoder reads it; `start` is where the second begins, or the
    end."""
    out = []
    for text in texts:
        found = tokenizer(*text)
        seconds = (i for i, s in enumerate(found.sequence_ids()) if s == 1)
        second = next(seconds, len(found.input_ids))
        out.append(Encoded(tuple(found.input_ids), second))
    return out


def encode_for_head(
    tokenizer: Any,
    sentences: Sequence[tuple[str, ...]],
    prompts: Sequence[str | Turns],
    encoder: bool,
    chat: bool,
) -> list[Encoded]:
    """Rows to be classified: sentences and pairs as an encoder reads them, one prompt as others
    do."""
    if encoder:
        return encode_texts(tokenizer, sentences)
    return [Encoded(ids, len(ids)) for ids in encode_prompts(tokenizer, prompts, chat)]


def _texts(
    tokenizer: Any, context: str | Turns, continuation: str, chat: bool, close: bool
) -> tuple[str, str, bool]:
    """Context and continuation in words, and whether they are plain or a template's."""
    if isinstance(context, str) and not chat:
        return context, continuation, True
    before = _as_chat(tokenizer, context)
    after = continuation.lstrip(" ")
    if close:
        turns = [*_turns(context), {"role": "assistant", "content": after}]
        said = str(tokenizer.apply_chat_template(turns, tokenize=False))
        whole = said.startswith(before)
        after = said[len(before) :] if whole else after + (tokenizer.eos_token or "")
    return before, after, False


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def encode_prompts(
    tokenizer: Any, contexts: Sequence[str | Turns], chat: bool
) -> list[tuple[int, ...]]:
    """Contexts alone as tokens, to be continued."""
    out = []
    for context in contexts:
        plain = isinstance(context, str) and not chat
        text = context if isinstance(context, str) and plain else _as_chat(tokenizer, context)
        ids = tokenizer(text, add_special_tokens=plain).input_ids
        out.append(tuple(_open(tokenizer, ids, text)))
    return out


def _open(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Tokens without the end that some tokenizers close every text with."""
    end = tokenizer.eos_token_id
    closed = end is not None and ids[-1] == end and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def _as_chat(tokenizer: Any, context: str | Turns) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "this model's tokenizer has no chat template, which conversations and "
            "dataset.chat=true need. Choose a model that is made for chats, or a dataset.prompt."
        )
    how = {"tokenize": False, "add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(_turns(context), **how))


def _turns(context: str | Turns) -> list[dict[str, str]]:
    turns = (("user", context),) if isinstance(context, str) else context
    return [{"role": role, "content": content} for role, content in turns]


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of different length as one int64 tensor, filled on the right."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*r, *[value] * (width - len(r))] for r in rows])
