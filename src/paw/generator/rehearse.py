"""Stage `rehearse`: everything a generator's training needs, looked at without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from paw.generator.generator import GeneratorStage, pairs_of
from paw.generator.groups import TRAIN, VAL
from paw.generator.texts import Prompts
from paw.generator.tokens import Checkpoints
from paw.store import Input, Stage, Watch, write_text


@dataclass(frozen=True, kw_only=True)
class RehearseResult:
    parameters: int
    pairs: int
    held: int
    tokens: int
    dim: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f} M parameters to {self.tokens:,} tokens of {self.dim}; "
            f"{self.pairs} pairs to learn from, {self.held} to validate; {self.steps} steps"
        )

    @property
    def said(self) -> str:
        return f"Dry run: {self}. One prompt went through. Nothing was trained."


STAGE = Stage(
    "rehearse",
    "1",
    "paw.generator.rehearse:rehearse",
    config=GeneratorStage,
    result=RehearseResult,
)


def rehearse(
    config: GeneratorStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> RehearseResult:
    """Pairs prompts and adapters, builds the network and sends one prompt through it.

    Args:
        inputs: as of stage `generator`.

    Raises:
        DataError: where there is nothing to learn from, or nothing to validate.
    """
    import torch

    from paw.generator.network import Network, padded, parameters

    prompts, checkpoints = Prompts(inputs["texts"].path), Checkpoints(inputs["tokens"].path)
    pairs = pairs_of(config, prompts, checkpoints)
    network = Network(checkpoints.layout, config.network, prompts.width).eval()
    with torch.inference_mode():
        made = network(*padded([prompts[pairs[0].group]]))
    assert made.shape == (1, checkpoints.layout.tokens, checkpoints.layout.dim)
    learnt = sum(p.role == TRAIN for p in pairs)
    size = min(config.fit.batch_size, learnt)
    result = RehearseResult(
        parameters=parameters(network),
        pairs=learnt,
        held=sum(p.role == VAL for p in pairs),
        tokens=checkpoints.layout.tokens,
        dim=checkpoints.layout.dim,
        steps=config.fit.epochs * (learnt // size),
    )
    write_text(out / "rehearsed.json", json.dumps(asdict(result)))
    return result
