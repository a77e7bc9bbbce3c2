"""Placebo: a real method, fitted on positions of the text that are paired at random. Both models'
own moments stay what they are; only what joins them is chance."""

from __future__ import annotations

from paw.transfer.methods import Placebo

METHOD = Placebo(
    shuffles=True,
    drawn=True,
    applies=lambda real: real.looks_at_text,
    otherwise="looks at no text, so there is no pairing to shuffle",
)
