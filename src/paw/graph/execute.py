"""Steps run in the order of their graph, shared with every other process that sees the store."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from paw.graph.step import Node, Source, Step, View, steps_of
from paw.store import Artifact, Busy, Holder, Input, Kept, Store, Watch, free_memory
from paw.store.store import Key

R = TypeVar("R")
POLL = 0.5  # seconds between looks at what other processes make


class Show(Watch, Protocol):
    """What an execution tells of itself."""

    def start(self, step: str) -> None: ...
    def finished(self, step: Step[Any], made: Artifact[Any], number: int, of: int) -> None: ...
    def failed(self, step: Step[Any], error: Exception) -> None: ...
    def waiting(self, step: Step[Any], holder: Holder) -> None: ...


class Execution:
    """What became of every step. It can be read while, and after, the steps run."""

    def __init__(self, nodes: Iterable[Node], store: Store) -> None:
        self.steps = steps_of(nodes)
        self.store = store
        self.failed: dict[str, Exception] = {}
        self.left_out: dict[str, Step[Any]] = {}  # an input of theirs failed
        self._made: dict[str, Artifact[Any]] = {}

    def __getitem__(self, step: Step[R]) -> Artifact[R]:
        return self._made[step.identity]

    def __contains__(self, node: Node) -> bool:
        return isinstance(node, Source) or node.identity in self._made

    def path(self, node: Node) -> Path:
        return node.path if isinstance(node, Source) else self[node].path

    def input(self, node: Node | View) -> Input:
        """A node as a stage reads it. Its content must be there."""
        if isinstance(node, View):
            return node.known_by(self.store, self.path(node.node))
        if isinstance(node, Source):
            return self.store.file(node.path)
        return self[node].as_input()

    def inputs(self, step: Step[Any]) -> dict[str, Input]:
        """What a step reads. All of it must be there."""
        return {name: self.input(node) for name, node in step.inputs.items()}

    def key(self, step: Step[Any]) -> Key:
        return self.store.key(step.stage, step.config, self.inputs(step))

    @property
    def unsettled(self) -> list[Step[Any]]:
        settled = self._made.keys() | self.failed.keys() | self.left_out.keys()
        return [step for step in self.steps if step.identity not in settled]

    def ready(self, step: Step[Any]) -> bool:
        return all(node in self for node in step.needs)

    def keep(self, step: Step[R], made: Artifact[R]) -> None:
        self._made[step.identity] = made


def execute(execution: Execution, show: Show) -> None:
    """Settles every step. In the graph's order, what is ready and not being made by another process
    goes first; it waits only where nothing else is left. A step that fails costs those that need
    it, and no other.

    Raises:
        Exception: the first failure, when everything else is settled.
    """
    kept, told = Kept(), set[str]()
    try:
        while steps := execution.unsettled:
            if not any(_settle(execution, step, show, kept) for step in steps):
                _wait(execution, show, told)
    finally:
        kept.release()
    if execution.failed:
        raise next(iter(execution.failed.values()))


def _settle(execution: Execution, step: Step[Any], show: Show, kept: Kept) -> bool:
    """False where a step has to wait, for its inputs or for another process."""
    lost = execution.failed.keys() | execution.left_out.keys()
    if any(node.identity in lost for node in step.needs):
        execution.left_out[step.identity] = step
        return True
    if not execution.ready(step):
        return False
    show.start(step.name)
    try:
        inputs = execution.inputs(step)
        made = execution.store.run(step.stage, step.config, inputs, show, kept)
    except Busy:
        return False
    except Exception as e:
        execution.failed[step.identity] = e
        show.failed(step, e)
        _forget_frames(e)
        return True
    execution.keep(step, made)
    left = len(execution.unsettled)
    show.finished(step, made, len(execution.steps) - left, len(execution.steps))
    return True


def _forget_frames(error: BaseException | None) -> None:
    """A traceback holds what its functions held: a model, whose memory later steps need."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    free_memory()


def _wait(execution: Execution, show: Show, told: set[str]) -> None:
    """Nothing is left but what other processes make."""
    for step in execution.unsettled:
        if execution.ready(step) and step.identity not in told:
            holder = execution.store.holder(execution.key(step))
            if holder is not None:
                told.add(step.identity)
                show.waiting(step, holder)
    time.sleep(POLL)
