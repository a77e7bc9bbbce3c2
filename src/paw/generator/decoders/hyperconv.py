"""Hyper-convolutions over width, height and length (Drag-and-Drop LLMs, arXiv 2506.16406, A.3), on
the grid of an adapter: its tensors × their tokens × hidden.

Each convolution takes another axis as its channels: ConvW the hidden numbers, ConvH a tensor's
tokens, ConvL the tensors. y = ConvL((ConvH(ConvW x) + tanh(ConvW(ConvH x)) + b)/3), after a
normalisation and beside a residual connection, as there. Kernels run along an axis whose order
means something: a tensor's tokens, and neighbouring tensors; ConvL, which mixes all tensors, has
none.
"""

from __future__ import annotations

import torch
from torch import nn

from paw.generator.config import NetworkConfig
from paw.generator.layout import Layout


class Block(nn.Module):
    """x: batch × rows × chunks × hidden."""

    def __init__(self, rows: int, chunks: int, hidden: int, kernel: int, dropout: float) -> None:
        super().__init__()

        def width() -> nn.Conv2d:
            return nn.Conv2d(hidden, hidden, (1, kernel), padding="same", bias=False)

        def height() -> nn.Conv2d:
            return nn.Conv2d(chunks, chunks, (kernel, 1), padding="same", bias=False)

        self.norm = nn.LayerNorm(hidden)
        self.w1, self.h1, self.h2, self.w2 = width(), height(), height(), width()
        self.bias = nn.Parameter(torch.zeros(chunks, hidden))
        self.length = nn.Conv2d(rows, rows, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        first = self._h(self.h1, self._w(self.w1, y))
        second = torch.tanh(self._w(self.w2, self._h(self.h2, y)))
        found: torch.Tensor = self.length((first + second + self.bias) / 3)
        out: torch.Tensor = x + self.dropout(found)
        return out

    @staticmethod
    def _w(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = conv(x.permute(0, 3, 1, 2))
        return found.permute(0, 2, 3, 1)

    @staticmethod
    def _h(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = conv(x.permute(0, 2, 1, 3))
        return found.permute(0, 2, 1, 3)


class HyperConv(nn.Module):
    at: torch.Tensor

    def __init__(self, config: NetworkConfig, layout: Layout) -> None:
        super().__init__()
        rows = layout.rows
        self.shape = (len(rows), max(r.tokens for r in rows))
        at = [n * self.shape[1] + i for n, r in enumerate(rows) for i in range(r.tokens)]
        self.register_buffer("at", torch.tensor(at), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(*self.shape, config.hidden, config.kernel, config.dropout)
                for _ in range(config.blocks)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, hidden = x.shape
        grid = x.new_zeros(batch, self.shape[0] * self.shape[1], hidden)
        grid = grid.index_copy(1, self.at, x)
        found: torch.Tensor = self.blocks(grid.view(batch, *self.shape, hidden))
        return found.reshape(batch, -1, hidden)[:, self.at]


DECODER = HyperConv
