"""What lies in a store: artifacts, what was left beside them, and what was made from what. It only
looks.

    <stage>/<key>                an artifact
    <stage>/<key>.unfinished     a training that can go on
    <stage>/<key>.tmp-…          what a stage writes now, or had written when it was killed
    <stage>/<key>.damaged-…      an artifact that was set aside
    <stage>/<key>.claim…         who makes the artifact now, or made it when it was killed
    bases/                       singular bases (transfer/bases.py)

Everything else, and folders that begin with a dot, is nothing that this file knows.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paw.store.store import MANIFEST, read_manifest

Kind = Literal["artifact", "unfinished", "temporary", "damaged", "claim"]
KINDS: dict[str, Kind] = {
    "": "artifact",
    ".unfinished": "unfinished",
    ".tmp-": "temporary",
    ".damaged-": "damaged",
    ".claim": "claim",
}
NAME = re.compile(r"[0-9a-f]{16}(|\.unfinished|(\.tmp-|\.damaged-|\.claim).*)")
BASES = "bases"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An artifact, or something that was left beside one."""

    kind: Kind
    path: Path
    size: int  # bytes of its files
    # Seconds since 1970: of an artifact when it was finished, of anything else its newest file
    changed: float
    seconds: float | None = None  # that the artifact cost
    content: str | None = None  # of an artifact, where its manifest can be read
    hashed: bool = False  # its manifest has a hash of every file
    reads: frozenset[str] = frozenset()  # contents, and names in this store, of its inputs

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name.partition(".")[0]

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def claim(self) -> Path:
        return self.path.with_name(f"{self.key}.claim")


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A store as it was when it was looked at."""

    root: Path
    entries: list[Entry]
    bases: int  # bytes

    def of(self, *kinds: Kind) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind in kinds]

    @property
    def size(self) -> int:
        return total(self.entries) + self.bases


def name_of(path: Path) -> str:
    """<stage>/<folder>: what runs call an artifact by."""
    return f"{path.parent.name}/{path.name}"


def total(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries)


def inventory(root: Path) -> Inventory:
    """Of a store that may not be there: then it is empty."""
    stages = [folder for folder in _folders(root) if folder.name != BASES]
    places = (path for stage in stages for path in sorted(stage.iterdir()))
    found = (look(path) for path in places)
    bases = _measure(root / BASES)[0] if (root / BASES).is_dir() else 0
    return Inventory(root=root, entries=[entry for entry in found if entry], bases=bases)


def look(path: Path) -> Entry | None:
    """What lies at a path of a stage's folder; None where it is nothing of a store's, or gone."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return None
    kind = KINDS[match[2] or match[1]]
    try:
        if kind != "artifact":
            size, newest = _measure(path)
            return Entry(kind=kind, path=path, size=size, changed=newest)
        finished = (path / MANIFEST).stat().st_mtime
        size, _ = _measure(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    said = read_manifest(path)
    if said is None:
        return Entry(kind=kind, path=path, size=size, changed=finished)
    places = (name_of(Path(place)) for place in said.get("paths", {}).values())
    return Entry(
        kind=kind,
        path=path,
        size=size,
        changed=finished,
        seconds=said["cost"].get("seconds"),
        content=said["content"],
        hashed="files" in said,
        reads=frozenset([*said.get("inputs", {}).values(), *places]),
    )


def users(found: Inventory, runs: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Of every artifact, by its name, the runs that use it: those that name it, and those that use
    what was made from it. An input is known by its content; and by its place too, since an adapter
    may be read by a part of its content.

    Args:
        runs: the names of artifacts that each run names.
    """
    artifacts = {entry.name: entry for entry in found.of("artifact")}
    known: dict[str, set[str]] = {name: {name} for name in artifacts}
    for name, entry in artifacts.items():
        if entry.content is not None:
            known.setdefault(entry.content, set()).add(name)
    using: dict[str, list[str]] = {name: [] for name in artifacts}
    for run, names in runs.items():
        seen, left = set[str](), [name for name in names if name in artifacts]
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += [made for read in artifacts[name].reads for made in known.get(read, ())]
        for name in seen:
            using[name].append(run)
    return using


def _folders(root: Path) -> list[Path]:
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in inside if path.is_dir() and not path.name.startswith(".")]


def _measure(path: Path) -> tuple[int, float]:
    """The bytes of all files, and when the newest of them changed; of an empty folder, when that
    did. Links are not followed, and what vanishes meanwhile does not count."""
    size, newest, own = 0, 0.0, path.lstat()
    for file in [path, *path.rglob("*")]:
        try:
            said = file.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(said.st_mode):
            size, newest = size + said.st_size, max(newest, said.st_mtime)
    return size, newest or own.st_mtime
