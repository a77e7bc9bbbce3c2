"""One matrix for all tokens, as in the original: hidden² × tokens parameters."""

from __future__ import annotations

import torch
from torch import nn

from paw.generator.config import NetworkConfig
from paw.generator.layout import Layout


class Dense(nn.Module):
    def __init__(self, config: NetworkConfig, layout: Layout) -> None:
        super().__init__()
        self.tokens, self.hidden = layout.tokens, config.hidden
        self.layers = nn.Sequential(
            nn.Linear(config.hidden, config.hidden * layout.tokens),
            nn.GELU(),
            nn.Dropout(config.dropout),
        )

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(prompt)
        return found.view(len(prompt), self.tokens, self.hidden)


EXPANDER = Dense
