"""task=pipeline: both bases, the source's adapter, its transfer and the target's own adapter, all
evaluated: how much of the gap between the target and its own adapter is recovered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from paw.evaluation.steps import evaluate
from paw.graph import Node
from paw.launch.outline import Gap, Outline, Row, Says, adapter_folder, numbered
from paw.models.steps import Base, base, given
from paw.refine.steps import refinements
from paw.tasks import transfer as moving
from paw.training.steps import train
from paw.transfer.steps import fits, methods, real_transfer, transfer

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class GivenConfig:
    """An adapter of the target model from elsewhere: none is trained then."""

    path: Optional[str] = None


@dataclass
class Config(moving.Config):
    target_adapter: GivenConfig = field(default_factory=GivenConfig)


def build(c: Config) -> Outline:
    source, target = base(c, c.source), base(c, c.target)
    adapter = moving.source_adapter(c, source)
    elsewhere = c.target_adapter.path
    own = given(elsewhere, target) if elsewhere else train(c, target)
    chosen = methods(c)
    moved = [transfer(c, adapter, source, target, method) for method in chosen]

    def row(name: str, base: Base, adapter: Node | None = None, draw_of: str | None = None) -> Row:
        step = evaluate(c, base, adapter, name)
        return Row(evaluation=step, model=base.name, adapter=adapter, draw_of=draw_of)

    refined = refinements(c, source, target, adapter, moved[0], c.transfer.method)
    names = numbered([method.method for method in chosen])
    before = [row("source base", source), row("source + own adapter", source, adapter)]
    bare = row("target base", target)
    transferred = [
        row(f"target + {name}", target, node, f"target + {method.method}")
        for name, node, method in zip(names, moved, chosen, strict=True)
    ]
    better = [row(f"target + {one.name}", target, one.adapter) for one in refined]
    best = row("target + own adapter", target, own)
    kept = dict(zip(map(adapter_folder, names), moved, strict=True))
    kept |= {adapter_folder(one.name): one.adapter for one in refined}
    return Outline(
        label=f"{source.name}-{target.name}",
        # so that the target is loaded once for all of its rows
        first=[*(r.evaluation for r in before), *moved],
        systems=[*before, bare, *transferred, *better, best],
        comparisons=[
            Says(step=real_transfer(moved[0])),
            *(Says(step=one.adapter) for one in refined if not one.control),
            # what is configured first: the refined adapter, where there is one
            Gap(base=bare, own=best, transferred=[*better[:1], *transferred, *better[1:]]),
        ],
        adapters={"source": adapter, **kept, "target_own": own},
        checks=[fits(own, target)] if elsewhere else [],
    )
