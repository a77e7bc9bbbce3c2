"""Placebo: another method's adapter with the opposite sign. What helps both ways is not the
adapter's doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paw.transfer.methods import Placebo

if TYPE_CHECKING:
    from torch import Generator, Tensor


def spoil(a: Tensor, b: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return a, -b


METHOD = Placebo(spoil=spoil, drawn=False)
