"""task=transfer: one adapter (adapter.path, or the source's own training) moved to the target and,
with refine=…, refined there without labels. No evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from paw.errors import ConfigError
from paw.evaluation.steps import usable
from paw.graph import Node
from paw.launch.outline import Outline, Says, adapter_folder, numbered
from paw.models.config import ModelConfig
from paw.models.steps import Base, base, given
from paw.refine.steps import Refines, refinements
from paw.training.steps import train
from paw.transfer.steps import methods, real_transfer, transfer


@dataclass
class Config(Refines):
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate.mode == "classify":
            raise ConfigError(
                f"task={self.task}: a trained head belongs to its own base and is not transferred. "
                "Use evaluate.mode=likelihood, where classes are words."
            )
        if not self.adapter.path and not self.adapter.transferable:
            raise ConfigError(
                f"task={self.task}: only LoRA is transferred (adapter=lora, rslora, qlora, dora, "
                "adalora), not what this adapter trains. Train it with task=train."
            )


def build(c: Config) -> Outline:
    source, target = base(c, c.source), base(c, c.target)
    adapter = source_adapter(c, source)
    chosen = methods(c)
    moved = [transfer(c, adapter, source, target, method) for method in chosen]
    refined = refinements(c, source, target, adapter, moved[0], c.transfer.method)
    names = [*numbered([method.method for method in chosen]), *(one.name for one in refined)]
    kept = [*moved, *(one.adapter for one in refined)]
    return Outline(
        label=f"transfer_{source.name}-{target.name}",
        first=kept,
        comparisons=[
            Says(step=real_transfer(moved[0])),
            *(Says(step=one.adapter) for one in refined if not one.control),
        ],
        adapters={"source": adapter, **dict(zip(map(adapter_folder, names), kept, strict=True))},
        checks=[usable(c, source), usable(c, target)],
    )


def source_adapter(c: Config, source: Base) -> Node:
    """The adapter that is moved: the given one, or one that is trained for it."""
    return given(c.adapter.path, source) if c.adapter.path else train(c, source)
