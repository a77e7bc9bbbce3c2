"""One matrix for all tokens, and nothing after it: what parts of a prompt add, adds up. Where tasks
are made by composition this says more of a new combination than `dense`, whose GELU it leaves out
(docs/generator.md has both)."""

from __future__ import annotations

from torch import nn

from paw.generator.config import NetworkConfig
from paw.generator.expanders.dense import Dense
from paw.generator.layout import Layout


class Linear(Dense):
    def __init__(self, config: NetworkConfig, layout: Layout) -> None:
        super().__init__(config, layout)
        self.layers = nn.Sequential(self.layers[0], nn.Dropout(config.dropout))


EXPANDER = Linear
