"""What a report is about: the systems of a run with their costs, and the steps of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from paw.evaluation.records import Record, read_records
from paw.evaluation.result import EvaluateResult
from paw.store import Artifact

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """A base model, alone or with an adapter, and its evaluation."""

    name: str
    model: str
    evaluation: Artifact[EvaluateResult]
    made: Sequence[Artifact[Any]] = ()  # by the stages before: training, transfer
    coverage: float | None = None  # share of the source's adapter that was transferred
    draw_of: str | None = None  # the placebo that this is one draw of

    @property
    def group(self) -> str:
        """What the draws of one placebo have in common; for any other system its own name."""
        return self.draw_of or self.name

    @property
    def result(self) -> EvaluateResult:
        return self.evaluation.result

    @cached_property
    def records(self) -> list[Record]:
        """One record per question, read once."""
        return read_records(self.evaluation.path)

    @property
    def stages(self) -> list[Artifact[Any]]:
        """All that the costs below are of."""
        return [*self.made, self.evaluation]

    @property
    def seconds(self) -> float:
        return sum(a.cost["seconds"] or 0 for a in self.stages)

    @property
    def ram_mib(self) -> float:
        """The largest peak of a stage."""
        return max(a.cost["ram_mib"] or 0 for a in self.stages)

    @property
    def gpu_mib(self) -> float | None:
        """The largest peak of a stage; None where no stage used a GPU."""
        return max((m for a in self.stages if (m := a.cost["gpu_mib"]) is not None), default=None)


@dataclass(frozen=True)
class Draws(Generic[T]):
    """What was found of the draws of one placebo, which differ only by chance; or of one system."""

    name: str  # the placebo's, or the system's
    found: list[T]

    @property
    def label(self) -> str:
        n = len(self.found)
        return self.name if n == 1 else f"{self.name}, {n} draws"


def draws(found: Iterable[T], system: Callable[[T], System]) -> list[Draws[T]]:
    """What belongs together, in the order in which the groups begin."""
    groups: dict[str, list[T]] = {}
    for one in found:
        groups.setdefault(system(one).group, []).append(one)
    return [
        Draws(name if len(several) > 1 else system(several[0]).name, several)
        for name, several in groups.items()
    ]


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A step of the run. Seconds and peaks are those of the step when it ran."""

    name: str
    stage: str
    state: Literal["computed", "reused", "failed", "left out"]
    seconds: float | None = None
    ram_mib: float | None = None
    gpu_mib: float | None = None
    cpu_percent: float | None = None  # of one processor, in the mean
    gpu_percent: float | None = None  # of the GPUs that it could use, in the mean
    needs: Sequence[str] = ()  # names of the steps whose artifacts it read
    artifact: str | None = None  # what it made or reused: <stage>/<folder>, below the store's root
    text: str = ""  # its result in a line, or why there is none
