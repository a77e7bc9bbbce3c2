"""What a stage is: one memoised unit of work, from a configuration and inputs to an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

R = TypeVar("R")
T = TypeVar("T")


class Watch(Protocol):
    """What a running stage may say of itself; it knows nothing of terminals or trackers."""

    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def say(self, text: str) -> None: ...


class Releasable(Protocol):
    def release(self) -> None: ...


class Kept:
    """What a process keeps in memory from one stage to the next, one object per type."""

    def __init__(self) -> None:
        self._objects: dict[Any, Any] = {}

    def get(self, kind: Callable[[], T]) -> T:
        """The object of a type, made where there is none."""
        if kind not in self._objects:
            self._objects[kind] = kind()
        found: T = self._objects[kind]
        return found

    def release(self) -> None:
        """Gives the memory back, before something else needs it."""
        for found in self._objects.values():
            found.release()


class Context:
    """What a stage's function gets beside configuration and inputs. It is a Watch, too."""

    def __init__(self, watch: Watch, unfinished: Path | None = None, kept: Kept | None = None):
        self._unfinished = unfinished
        self.kept = kept or Kept()
        self.progress, self.metrics, self.say = watch.progress, watch.metrics, watch.say

    @property
    def unfinished(self) -> Path:
        """Of a stage that resumes: a folder for what it would go on with. It survives failures and
        kills, and goes when the artifact is there."""
        assert self._unfinished is not None, "only a stage that resumes has this folder"
        return self._unfinished


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A unit of work, declared in the file of its name as STAGE.

    `function` is `module:function`, imported only when it must run:
    `function(config, inputs: Mapping[str, Input], out: Path, context: Context) -> R`.
    """

    name: str
    version: str  # of what it computes: raised by hand when results change
    function: str
    config: type[Any]  # the dataclass of its configuration
    result: type[R]  # a dataclass of JSON values, whose str() is a line for the console
    resumes: bool = False  # goes on from context.unfinished
    keeps: bool = False  # leaves a model in context.kept; all other stages get its memory back
    devices: Literal["none", "one", "all"] = "none"  # of the hardware profile, that it uses

    def restored(self, result: Mapping[str, Any]) -> R:
        """The result that a manifest holds. Fields that it lacks have their defaults."""
        known = {f.name for f in fields(self.result)}  # type: ignore[arg-type]
        return self.result(**{k: v for k, v in result.items() if k in known})


@dataclass(frozen=True)
class Input:
    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Artifact(Generic[R]):
    """A finished stage: its folder, its result, what it cost when it ran (seconds, ram_mib,
    gpu_mib), and whether it was reused now."""

    path: Path
    key: str
    content: str
    result: R
    cost: dict[str, float | None]
    reused: bool
    stage: str

    def as_input(self) -> Input:
        return Input(self.path, self.content)
