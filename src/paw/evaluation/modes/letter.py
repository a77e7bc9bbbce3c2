"""evaluate.mode=letter: as likelihood, of the letters that the options have in the prompt."""

from __future__ import annotations

from paw.evaluation.modes.likelihood import answer, metrics

__all__ = ["answer", "form", "metrics"]


def form(kind: str) -> str:
    return "letter"
