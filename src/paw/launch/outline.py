"""What a task builds: which systems it evaluates, what it compares, what it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paw import plugins
from paw.config.common import RunConfig
from paw.errors import ConfigError
from paw.evaluation.result import EvaluateResult
from paw.graph import Check, Node, Step
from paw.text import file_name


@dataclass(frozen=True, kw_only=True)
class Row:
    """A system: one row of the table."""

    evaluation: Step[EvaluateResult]
    model: str  # the base's name
    adapter: Node | None = None
    draw_of: str | None = None  # what several draws have in common

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def key(self) -> tuple[str, str]:
        """Two models may have one name, and two rows one step: a model's own adapter, moved to the
        same model."""
        return self.name, self.evaluation.identity


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How much of the gap between a base and its own adapter other systems recover."""

    base: Row
    own: Row
    transferred: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Systems beside the base that they adapt."""

    base: Row
    adapted: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Says:
    """What a step's result says of itself in words, as its `said`."""

    step: Step[Any]


Comparison = Gap | Beside | Says


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A task's graph with what is reported of it. The order of its parts is the order in which
    steps run, where nothing else decides."""

    label: str  # of the run folder
    systems: Sequence[Row] = ()
    comparisons: Sequence[Comparison] = ()
    adapters: dict[str, Node] = field(default_factory=dict)  # copied into the run folder
    models: dict[str, Step[Any]] = field(default_factory=dict)  # linked from there
    first: Sequence[Node] = ()  # what goes before the systems
    checks: Sequence[Check] = ()  # beside those of the steps

    @property
    def nodes(self) -> list[Node]:
        ends = [row.evaluation for row in self.systems]
        return [*self.first, *ends, *self.adapters.values(), *self.models.values()]


def outline_of(c: RunConfig, key: str) -> Outline:
    """The graph of a configuration's task.

    Args:
        key: what asks for it, for the message.

    Raises:
        ConfigError: for a task that has none.
    """
    task = plugins.load("tasks", c.task, "task")
    if not hasattr(task, "build"):
        raise ConfigError(f"{key}: task={c.task} has no steps to plan. Leave {key} out.")
    found: Outline = task.build(c)
    return found


def adapter_folder(name: str) -> str:
    """What a transferred adapter is called in the run folder."""
    return f"target_{file_name(name)}"


def numbered(names: Sequence[str]) -> list[str]:
    """Names that occur several times get their draw's number."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name} {seen[name]}" if names.count(name) > 1 else name)
    return out
