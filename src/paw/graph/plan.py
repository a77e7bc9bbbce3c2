"""What a graph would run: what is there, what another process makes, what the rest would cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from paw.graph.execute import Execution
from paw.graph.step import Node, Source, Step, View
from paw.store import MANIFEST, Store

State = Literal["there", "being made", "missing"]
Costs = list[tuple[dict[str, str], float]]  # inputs and seconds of what was made before


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step that is not run yet."""

    step: Step[Any]
    state: State
    seconds: float | None  # that it is likely to take; None where it is there, or nothing is known


def plan(nodes: Iterable[Node], store: Store) -> list[Planned]:
    """Every distinct step of a graph, or of several at once. Fetches, makes and writes nothing but
    the hashes of the files it looks at."""
    execution, found = Execution(nodes, store), dict[str, Planned]()
    stages = {step.stage.name for step in execution.steps}
    before = {stage: _costs(store.root / stage) for stage in stages}
    for step in execution.steps:
        known = {name: _fingerprint(execution, node) for name, node in step.inputs.items()}
        name = step.identity
        state: State = "missing"
        if all(known.values()):
            key = execution.key(step)
            name, made = key.value, store.find(step.stage, key)
            if made is not None:
                execution.keep(step, made)
                found[name] = Planned(step=step, state="there", seconds=None)
                continue
            state = "being made" if store.holder(key) else "missing"
        seconds = _expected(before[step.stage.name], known)
        found[name] = Planned(step=step, state=state, seconds=seconds)
    return list(found.values())


def _fingerprint(execution: Execution, node: Node | View) -> str | None:
    """The content of an input, where it is known already."""
    inner = node.node if isinstance(node, View) else node
    there = inner.find() is not None if isinstance(inner, Source) else inner in execution
    return execution.input(node).fingerprint if there else None


def _expected(before: Costs, known: Mapping[str, str | None]) -> float | None:
    """The median of what the same stage took before in this store, with as many of the same inputs
    as there are."""
    best: dict[int, list[float]] = {}
    for inputs, seconds in before:
        same = sum(value is not None and inputs.get(name) == value for name, value in known.items())
        best.setdefault(same, []).append(seconds)
    return median(best[max(best)]) if best else None


def _costs(folder: Path) -> Costs:
    """Inputs and seconds of the finished stages of a folder."""
    found = []
    for file in folder.glob(f"*/{MANIFEST}"):
        try:
            manifest = json.loads(file.read_text())
            found.append((manifest["inputs"], float(manifest["cost"]["seconds"])))
        except (OSError, ValueError, KeyError, TypeError):  # damaged: it will be made again
            continue
    return found
