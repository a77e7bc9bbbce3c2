"""Run a stage once per (config, inputs, version); the artifact is a folder that exists only when it is whole.

Transient fields follow stopes, defaults left out of the key and a hand-raised version follow exca, inputs by content with
a shortcut by time stamps follow DVC. Failures are never kept: unlike exca's, they are never results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from paw.errors import StageError
from paw.store.fingerprint import broken, content, digest, plain, seal
from paw.store.meter import Meter
from paw.store.write import sync, write_text
from paw.text import some

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MANIFEST, BEGUN = "stage.json", "begun.json"


class Watch(Protocol):
    """What a running stage may say of itself; it knows nothing of terminals or trackers."""

    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A stage's name, the version of what it computes (raise it by hand when results change), and its function,
    `module:function`, imported only when it must run: `function(config, inputs, out, watch) -> result`.

    One that resumes gets a fifth argument: a folder for what it would go on with, which survives failures and kills, and
    goes when the artifact is there."""

    name: str
    version: str
    function: str
    resumes: bool = False


@dataclass(frozen=True)
class Input:
    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, its result (JSON), what it cost when it ran, and whether it was reused now."""

    path: Path
    key: str
    content: str
    result: dict[str, Any]
    cost: dict[str, float | None]
    reused: bool
    stage: str = ""

    def as_input(self) -> Input:
        return Input(self.path, self.content)


@dataclass
class Store:
    """Artifacts under `root`/<stage>/<fingerprint>/, shared by all runs and processes that see the folder."""

    root: Path
    force: Sequence[str] = ()
    verify: bool = (
        False  # read all of an artifact that is used, not only what changed its size or time
    )
    _forced: set[str] = field(default_factory=set)
    _whole: set[str] = field(default_factory=set)  # what was verified already

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StageError(
                f"paths.artifacts: {self.root} cannot be made: {e.strerror}. Choose a folder you may write to."
            ) from None

    def file(self, path: Path) -> Input:
        """A file or folder as an input, known by its content."""
        manifest = _manifest(path)
        ours = (path / MANIFEST).is_file() and path.resolve().is_relative_to(self.root.resolve())
        if manifest is None and not ours:
            return Input(path, content(path, self._memo))
        damaged = [MANIFEST] if manifest is None else self._damaged(path, manifest)
        if damaged:
            raise StageError(
                f"{path}: is damaged ({some(damaged)}). Run the command that made it again, which makes it anew."
            )
        assert manifest is not None
        return Input(path, manifest["content"])

    def tokenizer(self, folder: Path) -> Input:
        """A model's folder known by its tokenizer alone: what is encoded for one model serves all that share it."""
        files = [folder / name for name in TOKENIZER if (folder / name).is_file()]
        return Input(folder, digest({f.name: content(f, self._memo) for f in files}))

    def run(self, stage: Stage, config: Any, inputs: Mapping[str, Input], watch: Watch) -> Artifact:
        """The artifact of a stage: found if it was made before, waited for if another process makes it, else made.

        Args:
            config: what the stage's function gets; its non-transient fields are part of the key.
            inputs: by name; their fingerprints are part of the key.
        """
        what = {
            "stage": stage.name,
            "version": stage.version,
            "config": plain(config),
            "inputs": {k: v.fingerprint for k, v in sorted(inputs.items())},
        }
        key = digest(what)
        final = self.root / stage.name / key[:16]
        force = self._forces(stage.name) and key not in self._forced
        if not force and (found := self._found(final, key)):
            return found
        final.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(final, watch):
            if not force and (
                found := self._found(final, key)
            ):  # another process made it while we waited
                return found
            if not force and final.exists():
                self._set_aside(final, watch)
            self._forced.add(key)
            self._sweep(final)
            work = final.with_name(f"{final.name}.tmp-{socket.gethostname()}-{os.getpid()}")
            work.mkdir()
            module, _, name = stage.function.partition(":")
            try:
                with Meter() as meter:
                    function = getattr(import_module(module), name)
                    unfinished = final.with_name(f"{final.name}.unfinished")
                    more = [_begun(unfinished, what)] if stage.resumes else []
                    result = function(config, inputs, work, watch, *more)
                manifest = {
                    "key": key,
                    **what,
                    "content": content(work, self._memo),
                    "files": seal(work, self._memo),
                    "result": result,
                    "cost": meter.cost(),
                    "host": socket.gethostname(),
                    "paths": {k: str(v.path) for k, v in inputs.items()},
                }
                manifest = json.loads(json.dumps(manifest))
                write_text(
                    work / MANIFEST, json.dumps(manifest | {"seal": digest(manifest)}, indent=1)
                )
                sync(work)
                if (
                    final.exists()
                ):  # forced: the old artifact stays until this moment, and goes aside whole
                    final.rename(final.with_name(f"{final.name}.tmp-old"))
                work.rename(final)  # the moment from which it exists
                self._sweep(final)
                shutil.rmtree(unfinished, ignore_errors=True)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)  # failures are never results
                raise
            finally:
                free_memory()
        return Artifact(
            final,
            key,
            manifest["content"],
            result,
            manifest["cost"],
            reused=False,
            stage=stage.name,
        )

    def _forces(self, stage: str) -> bool:
        return bool({stage, "all"} & set(self.force))

    @property
    def _memo(self) -> Path:
        return self.root / ".content"

    def _found(self, final: Path, key: str) -> Artifact | None:
        """The finished artifact, if it is there and whole."""
        manifest = _manifest(final)
        if manifest is None or manifest["key"] != key or self._damaged(final, manifest):
            return None
        return Artifact(
            final,
            key,
            manifest["content"],
            manifest["result"],
            manifest["cost"],
            reused=True,
            stage=manifest["stage"],
        )

    def _damaged(self, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
        """Files of an artifact that are not what its stage wrote. Artifacts of before hashes were kept are not checked."""
        if str(folder) in self._whole:
            return []
        found = broken(folder, manifest.get("files", {}), None if self.verify else self._memo)
        if not found:
            self._whole.add(str(folder))
        return found

    def _set_aside(self, final: Path, watch: Watch) -> None:
        """A damaged artifact stays, under another name, for whoever wants to know what happened to it."""
        manifest = _manifest(final)
        damaged = [MANIFEST] if manifest is None else self._damaged(final, manifest)
        aside = final.with_name(
            f"{final.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        )
        final.rename(aside)
        watch.say(
            f"{final} is damaged ({some(damaged)}): set aside as {aside.name}, and made again"
        )

    def _sweep(self, final: Path) -> None:
        """Under the lock nobody else makes this artifact: what lies beside it was left by a killed process."""
        for left in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, final: Path, watch: Watch) -> Iterator[None]:
        lock = FileLock(f"{final}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            watch.say("another process is making this; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What an artifact's folder says of itself; None where it says nothing, or not what was written."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    if (
        not isinstance(found, dict)
        or not {"key", "content", "result", "cost", "stage"} <= found.keys()
    ):
        return None
    sealed = found.pop("seal", None)
    return found if sealed is None or sealed == digest(found) else None


def _begun(folder: Path, what: Mapping[str, Any]) -> Path:
    """The folder of an unfinished stage, with what it is the beginning of."""
    folder.mkdir(exist_ok=True)
    if not (folder / BEGUN).is_file():
        write_text(folder / BEGUN, json.dumps(what, indent=1))
    return folder


def free_memory() -> None:
    """A stage's models are held by reference cycles; on a GPU nothing else would collect them before the next loads."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
