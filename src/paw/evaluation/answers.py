"""What a written answer says. What cannot be parsed is counted and reported, never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence

# gsm8k's filters in the harness, version 3.0
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LETTER = re.compile(
    r"\s*(?:(?:the\s+)?(?:correct\s+)?answer(?:\s+is)?\s*:?\s*)?\(?([A-Z])(?:[).:,]|\s*(?:\n|$))",
    re.IGNORECASE,
)


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def strict(text: str) -> str | None:
    """The number behind the first ####."""
    found = STRICT.search(text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """The last number of the text."""
    found = FLEXIBLE.findall(text)
    return next((part for part in found[-1] if part), "").strip() if found else None


def plain(answer: str) -> str:
    """What the harness compares: without what stands before ####, commas, dollar signs and a full
    stop at the end."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def letter(text: str, offered: str) -> int | None:
    """The option that a text begins by naming: "B", "(B)", "B. …", "The answer is B."; None for
    anything else."""
    found = LETTER.match(text)
    return offered.find(found[1].upper()) if found and found[1].upper() in offered else None
