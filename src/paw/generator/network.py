"""From the vectors of a prompt's examples to the tokens of an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paw import plugins
from paw.generator.config import DECODERS, EXPANDERS, NetworkConfig
from paw.generator.layout import Layout


class Mean(nn.Module):
    """The mean of a set's vectors."""

    def forward(self, vectors: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        weight = there[..., None].to(vectors.dtype)
        return (vectors * weight).sum(1) / weight.sum(1)


class Attention(nn.Module):
    """A mean whose weights are learnt; without places, so that a set's order does not count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, vectors: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        scores = self.score(vectors)[..., 0].masked_fill(~there, -torch.inf)
        found: torch.Tensor = (scores.softmax(1)[..., None] * vectors).sum(1)
        return found


class Whitening(nn.Module):
    """Centred vectors along their principal directions, each at variance 1 (but for a ridge). A
    part of what is kept, not of what is trained."""

    centre: torch.Tensor
    turn: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("turn", torch.eye(width))

    def fit(self, vectors: torch.Tensor, ridge: float) -> None:
        """
        Args:
            vectors: the training prompts', pooled (prompts × width).
            ridge: added to variances.
        """
        self.centre.copy_(vectors.mean(0))
        off = (vectors - self.centre).double()
        values, directions = torch.linalg.eigh(off.T @ off / len(off))
        seen = values > 1e-6 * values.max()  # in other directions nothing was learnt
        self.turn.copy_(directions * (values.clamp_min(0) + ridge).rsqrt() * seen)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (vectors - self.centre) @ self.turn
        return found


class Network(nn.Module):
    """Set pooling, a projection where widths differ, the expander, the decoder, the output.

    Args:
        width: of the encoder's vectors. The encoder is no part of this: it is frozen, and its
            vectors are computed once.
    """

    def __init__(self, layout: Layout, config: NetworkConfig, width: int) -> None:
        super().__init__()
        hidden = config.hidden
        self.whitening = Whitening(width) if config.whiten is not None else None
        self.pooling = Attention(width) if config.pooling == "attention" else Mean()
        self.projection: nn.Module = nn.Identity()
        if width != hidden:
            self.projection = _mlp(width, 2 * hidden, hidden, config.dropout)
        self.expander = _part(EXPANDERS, config.expander).EXPANDER(config, layout)
        self.decoder = _part(DECODERS, config.decoder).DECODER(config, layout)
        self.output = _mlp(hidden, 2 * hidden, layout.dim, config.dropout)
        self.last: nn.Module = nn.Identity()
        if config.residual:  # what is generated at first is the mean
            for parameter in self.output[-1].parameters():
                nn.init.zeros_(parameter)
        else:
            self.last = nn.LayerNorm(layout.dim)

    def forward(self, vectors: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """(batch × tokens × dim), in units of the checkpoints' spread around their mean; where it
        is not residual, values themselves.

        Args:
            vectors: batch × examples × width, filled up.
            there: which of them are examples (batch × examples).
        """
        if self.whitening is not None:
            vectors = self.whitening(vectors)
        prompt = self.projection(self.pooling(vectors, there))
        found: torch.Tensor = self.last(self.output(self.decoder(self.expander(prompt))))
        return found


def _mlp(width: int, inner: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, out)
    )


def _part(folder: str, name: str) -> Any:
    return plugins.load(folder, name, f"generator.network.{folder.rpartition('/')[2][:-1]}")


def padded(sets: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets of vectors as one batch, and which places hold one."""
    most = max(map(len, sets))
    vectors = torch.zeros(len(sets), most, sets[0].shape[1])
    there = torch.zeros(len(sets), most, dtype=torch.bool)
    for i, one in enumerate(sets):
        vectors[i, : len(one)] = torch.as_tensor(one)
        there[i, : len(one)] = True
    return vectors, there


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
