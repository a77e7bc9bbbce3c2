"""Steps of this part, and what a task that refines reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from paw.data.steps import split
from paw.errors import ConfigError
from paw.graph import Check, Node, Source, Step, View
from paw.models.load import resolve_runtime
from paw.models.steps import Base, attached
from paw.refine.config import OF_BASE, SHUFFLED, RefineConfig, TeachStage
from paw.refine.prompts import STAGE as PROMPTS
from paw.refine.prompts import PromptsResult, PromptsStage
from paw.refine.refine import STAGE as REFINE
from paw.refine.refine import RefineResult, RefineStage
from paw.refine.signals import signal_named
from paw.refine.teach import STAGE as TEACH
from paw.refine.teach import TeachResult
from paw.store import Store
from paw.training.steps import Trains, train
from paw.transfer.steps import Transfers


@dataclass
class Refines(Transfers, Trains):
    """What a task that refines reads."""

    refine: RefineConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine.on and self.evaluate.mode in ("letter", "generate"):
            raise ConfigError(
                f"refine: the source is asked as training asks, not with evaluate.mode="
                f"{self.evaluate.mode}. Use evaluate.mode=likelihood, or refine=none."
            )
        sharded = self.hardware.strategy in ("fsdp", "deepspeed") and self.hardware.devices > 1
        if self.refine.on and sharded and "gains" in self.refine.learn:
            raise ConfigError(
                f"refine.learn: gains are not learnt with hardware.strategy="
                f"{self.hardware.strategy}. Use refine.learn=[factors], or hardware.strategy=ddp."
            )


@dataclass(frozen=True, kw_only=True)
class Refined:
    """A refined system beside the others: what it is called, and the step of its adapter."""

    name: str
    adapter: Step[Any]
    control: bool = True


def refine(
    c: Refines,
    source: Base,
    target: Base,
    *,
    adapter: Node | None,
    start: Node | None,
    called: str,
    shuffle: bool = False,
) -> Step[RefineResult]:
    """The start, trained on what the source says.

    Args:
        adapter: the source's; None for the control that learns from the base.
        start: an adapter of the target; None for a fresh one.
        called: what the start is called in the step's name.
        shuffle: for the control whose answers belong to other prompts.
    """
    r, runtime = c.refine, resolve_runtime(c.hardware)
    inputs: dict[str, Node | View] = {
        "model": target.node,
        "lessons": _teach(c, source, target, adapter),
    }
    if start is not None:
        inputs["start"] = attached(start)
    config = RefineStage(
        dataset=c.dataset,
        adapter=replace(c.adapter, path=None),
        learn=[what for what in r.learn if start is not None or what != "gains"],
        steps=r.steps,
        lr=r.lr,
        gain_steps=r.gain_steps,
        gain_lr=r.gain_lr,
        batch_size=r.batch_size,
        val_every=r.val_every,
        patience=r.patience,
        held=r.held,
        max_length=r.max_length,
        seed=r.seed,
        shuffle=shuffle,
        runtime=runtime,
        devices=runtime.devices * runtime.nodes,
        name=target.config.hub,
        trust_remote_code=target.config.trust_remote_code,
    )
    mixed = ", answers shuffled" if shuffle else "" if adapter else " on the base's answers"
    return Step(stage=REFINE, name=f"refine {called}{mixed}", config=config, inputs=inputs)


def refinements(
    c: Refines, source: Base, target: Base, adapter: Node, moved: Step[Any], method: str
) -> list[Refined]:
    """The refined adapter, then its controls.

    Args:
        adapter: the source's.
        moved: that adapter on the target, by the configured method.
        method: its name.
    """
    r, fresh = c.refine, c.refine.start == "fresh"
    if not r.on:
        return []
    start, called = (None, "fresh") if fresh else (moved, method)
    name = f"{called}, refined"
    found = [
        Refined(
            name=name,
            adapter=refine(c, source, target, adapter=adapter, start=start, called=called),
            control=False,
        )
    ]
    made: dict[str, Callable[[], Step[Any]]] = {
        "fresh": lambda: refine(c, source, target, adapter=adapter, start=None, called="fresh"),
        "gains": lambda: refine(
            replace(c, refine=replace(r, learn=["gains"])),
            source,
            target,
            adapter=adapter,
            start=moved,
            called=f"{method}, gains only",
        ),
        "base": lambda: refine(c, source, target, adapter=None, start=start, called=called),
        "shuffled": lambda: refine(
            c, source, target, adapter=adapter, start=start, called=called, shuffle=True
        ),
        "own": lambda: train(replace(c, train=replace(c.train, max_steps=r.steps)), target),
    }
    names = {
        "fresh": "fresh, refined",
        "gains": f"{method}, gains only",
        "base": f"{name} on {OF_BASE}",
        "shuffled": f"{name} on {SHUFFLED}",
        "own": "own adapter, as many steps",
    }
    for control in dict.fromkeys(r.controls):
        if not (control in ("fresh", "gains") and fresh):
            found.append(Refined(name=names[control], adapter=made[control]()))
    return found


def _teach(c: Refines, source: Base, target: Base, adapter: Node | None) -> Step[TeachResult]:
    r = c.refine
    inputs: dict[str, Node | View] = {
        "prompts": _prompts(c, source, target),
        "model": source.node,
    }
    if adapter is not None:
        inputs["adapter"] = attached(adapter)
    if signal_named(r.signal).reads_target:
        inputs["target"] = target.node
    config = TeachStage(
        signal=r.signal,
        dataset=c.dataset,
        max_new_tokens=r.max_new_tokens,
        samples=r.samples,
        temperature=r.temperature,
        beta=r.beta,
        top=r.top,
        seed=r.seed,
        runtime=resolve_runtime(c.hardware),
        trust_remote_code=(source.config.trust_remote_code, target.config.trust_remote_code),
    )
    who = "its adapter" if adapter is not None else "no adapter"
    name = f"ask {source.name} with {who} ({r.signal})"
    return Step(stage=TEACH, name=name, config=config, inputs=inputs)


def _prompts(c: Refines, source: Base, target: Base) -> Step[PromptsResult]:
    r = c.refine
    inputs: dict[str, Node | View] = {}
    writer = source if r.writer == "source" else target
    name = f"prompts of {c.dataset.name}"
    if r.seeds:
        inputs = {"seeds": _file("refine.seeds", r.seeds), "model": writer.node}
        name = f"prompts that {writer.name} writes"
    elif r.prompts:
        inputs = {"file": _file("refine.prompts", r.prompts)}
        name = f"prompts of {r.prompts}"
    else:
        inputs = {"data": split(c, c.dataset, c.dataset.train_split)}
    config = PromptsStage(
        dataset=c.dataset,
        split=None if r.seeds or r.prompts else c.dataset.train_split,
        count=r.count,
        seed=r.seed,
        raw=r.raw,
        temperature=r.temperature if r.seeds else 1.0,
        runtime=resolve_runtime(c.hardware),
        trust_remote_code=bool(r.seeds) and writer.config.trust_remote_code,
    )
    return Step(stage=PROMPTS, name=name, config=config, inputs=inputs)


def _file(key: str, text: str) -> Source:
    """A user's file of prompts."""
    path = Path(text).expanduser()

    def look(store: Store) -> str:
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is no file. Give a text with a prompt a line.")
        return str(path)

    return Source.at(key, path, checks=[Check(name=key, look=look)])
