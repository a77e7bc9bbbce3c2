"""The stack of PAW's own generator, for parity: places are learnt and added, then blocks of three
convolutions along the tokens, which it calls ConvW, ConvH and ConvL, a normalisation, GELU and
dropout, beside a residual connection."""

from __future__ import annotations

import torch
from torch import nn

from paw.generator.config import NetworkConfig
from paw.generator.layout import Layout

INIT = 0.02


class Block(nn.Module):
    """x: batch × tokens × hidden."""

    def __init__(self, hidden: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv1d(hidden, hidden, kernel, padding="same") for _ in range(3))
        )
        self.after = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.after(self.convs(x.transpose(1, 2)).transpose(1, 2))
        return x + found


class HyperConvPaw(nn.Module):
    def __init__(self, config: NetworkConfig, layout: Layout) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(layout.tokens, config.hidden) * INIT)
        self.blocks = nn.Sequential(
            *(Block(config.hidden, config.kernel, config.dropout) for _ in range(config.blocks))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(x + self.places)
        return found


DECODER = HyperConvPaw
