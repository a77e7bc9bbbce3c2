"""What the tokens of a vocabulary stand for, in bytes: by these two vocabularies compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from paw.data.tokenise import Encoded

BLANK = "▁"  # SentencePiece's


def shared_tokens(source: Any, target: Any) -> list[tuple[int, int]]:
    """Token ids (source, target) of the same bytes, leading blank included; special and
    byte-fallback tokens left out."""
    ours, theirs = by_bytes(source), by_bytes(target)
    return [(ours[text], theirs[text]) for text in sorted(ours.keys() & theirs.keys())]


def by_bytes(tokenizer: Any) -> dict[bytes, int]:
    """Token ids by what they stand for; without special tokens and those of single bytes that are
    only a fallback."""
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


def offsets(row: Encoded, continuation: str, texts: Mapping[int, bytes]) -> list[int]:
    """Where in the continuation, in bytes, each of its tokens begins; nothing where their bytes are
    not its own, as when a token reaches into the context. An end token behind it has no place.

    Args:
        texts: what tokens stand for, by their ids.
    """
    whole, at, out = continuation.encode(), 0, list[int]()
    for token in row.ids[row.start :]:
        if at == len(whole):
            break
        text = texts.get(token)
        if not text or not whole.startswith(text, at):
            return []
        out.append(at)
        at += len(text)
    return out if at == len(whole) else []
