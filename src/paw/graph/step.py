"""What a graph is made of. Building one reads no result and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, Union

from paw.errors import PawError
from paw.store import Input, Stage, Store, Watch, digest, plain

R = TypeVar("R")


class Absent(PawError):
    """Something that is not on this machine, and was not fetched."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that can be known before anything runs: used at the start of a run, and by
    task=validate."""

    name: str
    look: Callable[[Store], str]  # what was found; raises PawError where it is wrong
    warns: bool = False  # what it finds, if anything, is a warning
    thorough: bool = False  # takes too long for the start of a run: task=validate only
    of: str = ""  # the identity of what it looks at, where several have one name


@dataclass(eq=False, kw_only=True)
class Source:
    """A file or folder that no stage makes: a base model, a split, an adapter from elsewhere."""

    name: str  # for people
    described: Any  # what it is while its content is not known, as JSON
    finder: Callable[[], Path | None]  # without fetching or making anything
    getter: Callable[[Watch], Path]  # found, fetched or made
    checks: Sequence[Check] = ()
    elsewhere: Callable[[], str] | None = None  # what is known of it where it could be fetched from
    _path: Path | None = field(default=None, init=False)

    def find(self) -> Path | None:
        """Where it is on this machine; None where it would have to be fetched or made."""
        if self._path is None:
            self._path = self.finder()
        return self._path

    def get(self, watch: Watch) -> Path:
        """Where it is, fetched or made if need be."""
        self._path = self.getter(watch)
        return self._path

    @property
    def path(self) -> Path:
        """
        Raises:
            Absent: where it is not on this machine yet.
        """
        found = self.find()
        if found is None:
            raise Absent(f"{self.name} is not on this machine yet")
        return found

    @cached_property
    def identity(self) -> str:
        return digest(self.described)

    @classmethod
    def at(cls, key: str, path: Path, folder: bool = False, checks: Sequence[Check] = ()) -> Source:
        """What a user has named by a path: a file, or a folder.

        Args:
            key: the configuration's, for people.
        """
        there = path.is_dir if folder else path.is_file
        return cls(
            name=f"{key} {path}",
            described=[key, str(path)],
            finder=lambda: path if there() else None,
            getter=lambda watch: path,
            checks=checks,
        )


@dataclass(frozen=True, eq=False)
class View:
    """A node known by a part of its content: what needs no more is shared by all that agree."""

    node: Node
    what: str
    known_by: Callable[[Store, Path], Input]

    @cached_property
    def identity(self) -> str:
        return digest([self.what, self.node.identity])


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(Generic[R]):
    """A stage with its configuration and inputs. Two steps of one identity are the same step."""

    stage: Stage[R]
    name: str  # for people
    config: Any
    inputs: Mapping[str, Node | View]
    checks: Sequence[Check] = ()

    @cached_property
    def identity(self) -> str:
        inputs = {name: node.identity for name, node in sorted(self.inputs.items())}
        return digest([self.stage.name, self.stage.version, plain(self.config), inputs])

    @property
    def needs(self) -> list[Node]:
        return [n.node if isinstance(n, View) else n for n in self.inputs.values()]


Node = Union[Source, "Step[Any]"]


def steps_of(nodes: Iterable[Node]) -> list[Step[Any]]:
    """All steps that nodes need and are, each once, what is needed first."""
    return [n for n in _upstream(nodes) if isinstance(n, Step)]


def sources_of(nodes: Iterable[Node]) -> list[Source]:
    return [n for n in _upstream(nodes) if isinstance(n, Source)]


def _upstream(nodes: Iterable[Node]) -> list[Node]:
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.identity in found:
            return
        for needed in node.needs if isinstance(node, Step) else ():
            visit(needed)
        found[node.identity] = node

    for node in nodes:
        visit(node)
    return list(found.values())
