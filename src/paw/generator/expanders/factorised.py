"""What a token is (its layer, module, side and place there, and a few numbers of its own), scaled
and shifted by the prompt (FiLM, arXiv 1709.07871)."""

from __future__ import annotations

import torch
from torch import nn

from paw.generator.config import NetworkConfig
from paw.generator.layout import Layout

INIT = 0.02


class Factorised(nn.Module):
    numbers: torch.Tensor

    def __init__(self, config: NetworkConfig, layout: Layout) -> None:
        super().__init__()
        places = [(r.layer, r.module, r.side, i) for r in layout.rows for i in range(r.tokens)]
        columns = list(zip(*places, strict=True))
        tables = [sorted(set(column)) for column in columns]
        numbers = [
            [table.index(value) for value in column]
            for table, column in zip(tables, columns, strict=True)
        ]
        self.register_buffer("numbers", torch.tensor(numbers), persistent=False)
        self.tables = nn.ModuleList(nn.Embedding(len(t), config.hidden) for t in tables)
        self.free = nn.Parameter(torch.randn(layout.tokens, config.free) * INIT)
        self.mix = nn.Linear(config.free, config.hidden, bias=False)
        self.film = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, 2 * config.hidden),
        )

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        code: torch.Tensor = self.mix(self.free)
        for table, numbers in zip(self.tables, self.numbers, strict=True):
            code = code + table(numbers)
        scale, shift = self.film(prompt)[:, None].chunk(2, dim=-1)
        found: torch.Tensor = code * (1 + scale) + shift
        return found


EXPANDER = Factorised
