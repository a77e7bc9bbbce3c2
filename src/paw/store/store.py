"""Runs a stage once per configuration, inputs and version; its artifact is a folder that exists
only when it is whole.

Transient fields are as in stopes; defaults left out of the key and a version raised by hand as in
exca; inputs by content, with a shortcut by time stamps, as in DVC. A failure is never kept: unlike
exca's, it is no result.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from paw.errors import StageError
from paw.store import journal
from paw.store.claim import Claims, Holder
from paw.store.fingerprint import broken, content, digest, plain, seal
from paw.store.meter import Meter
from paw.store.stage import Artifact, Context, Input, Kept, Stage, Watch
from paw.store.stop import Preempted
from paw.store.write import sync, write_text
from paw.text import some

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
MANIFEST, BEGUN = "stage.json", "begun.json"

R = TypeVar("R")


class Busy(Exception):
    """Another process makes this artifact now: who, or None where it has just ended."""


@dataclass(frozen=True)
class Key:
    """What an artifact is of, and where it lies."""

    what: dict[str, Any]
    value: str
    folder: Path

    @property
    def claim(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.claim")

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.unfinished")


@dataclass
class Store:
    """Artifacts in `root`/<stage>/<fingerprint>/, shared by all runs and processes that see it."""

    root: Path
    force: Sequence[str] = ()
    verify: bool = False  # read artifacts in full, not only files that changed in size or time
    claims: Claims = field(default_factory=Claims)
    _forced: set[str] = field(default_factory=set)  # what was made again
    _whole: set[str] = field(default_factory=set)  # what was verified already

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StageError(
                f"paths.artifacts: {self.root} cannot be made: {e.strerror}. Choose a folder that "
                "you may write to."
            ) from None

    def file(self, path: Path) -> Input:
        """A file or folder as an input, known by its content."""
        manifest = read_manifest(path)
        ours = (path / MANIFEST).is_file() and path.resolve().is_relative_to(self.root.resolve())
        if manifest is None and not ours:
            return Input(path, content(path, self._memo))
        damaged = [MANIFEST] if manifest is None else self._damaged(path, manifest)
        if damaged:
            raise StageError(
                f"{path}: is damaged ({some(damaged)}). Repeat the command that made it, and it is "
                "made anew."
            )
        assert manifest is not None
        return Input(path, manifest["content"])

    def content(self, path: Path) -> str:
        """The hash of a file's or folder's content; read again only where it has changed."""
        return content(path, self._memo)

    def key(self, stage: Stage[Any], config: Any, inputs: Mapping[str, Input]) -> Key:
        """What identifies an artifact: non-transient, non-default fields of the configuration, and
        the content of the inputs."""
        what = {
            "stage": stage.name,
            "version": stage.version,
            "config": plain(config),
            "inputs": {k: v.fingerprint for k, v in sorted(inputs.items())},
        }
        value = digest(what)
        return Key(what, value, self.root / stage.name / value[:16])

    def find(self, stage: Stage[R], key: Key) -> Artifact[R] | None:
        """The artifact that was made before, where it is whole and need not be made again."""
        forced = {stage.name, "all"} & set(self.force) and key.value not in self._forced
        return None if forced else self._found(stage, key)

    def holder(self, key: Key) -> Holder | None:
        """The process that makes an artifact now."""
        return self.claims.holder(key.claim)

    def damaged(self, folder: Path) -> list[str]:
        """The files of an artifact that are not what its stage wrote."""
        manifest = read_manifest(folder)
        return [MANIFEST] if manifest is None else self._damaged(folder, manifest)

    def set_aside(self, folder: Path) -> Path:
        """A damaged artifact stays, by another name, for whoever wants to know what happened. The
        claim is held."""
        when = time.strftime("%Y%m%d-%H%M%S")
        return folder.rename(folder.with_name(f"{folder.name}.damaged-{when}-{os.getpid()}"))

    def remove(self, folder: Path) -> None:
        """An artifact, or what was left beside one. The claim is held. It has lost its name before
        its first file goes: what a kill leaves is rubbish that the next maker sweeps."""
        key = folder.name.partition(".")[0]
        gone = folder.rename(folder.with_name(f"{key}.tmp-removed-{uuid.uuid4().hex[:12]}"))
        shutil.rmtree(gone)

    def run(
        self,
        stage: Stage[R],
        config: Any,
        inputs: Mapping[str, Input],
        watch: Watch,
        kept: Kept | None = None,
    ) -> Artifact[R]:
        """The artifact of a stage: found if it was made before, else made.

        Args:
            config: what the stage's function gets; its non-transient fields are part of the key.
            inputs: by name; their fingerprints are part of the key.

        Raises:
            Busy: where another process makes it.
        """
        key = self.key(stage, config, inputs)
        found = self.find(stage, key)
        if found is not None:
            return found
        key.folder.parent.mkdir(parents=True, exist_ok=True)
        claim = self.claims.take(key.claim)
        if claim is None:
            raise Busy(self.holder(key))
        try:
            found = self.find(stage, key)  # another process may just have made it
            return found or self._make(stage, config, inputs, key, watch, kept)
        finally:
            claim.release()

    def _make(
        self,
        stage: Stage[R],
        config: Any,
        inputs: Mapping[str, Input],
        key: Key,
        watch: Watch,
        kept: Kept | None,
    ) -> Artifact[R]:
        """Runs the stage's function, and commits what it wrote. The claim is held."""
        final = key.folder
        if final.exists() and self._found(stage, key) is None:
            self._set_aside(final, watch)
        self._forced.add(key.value)
        self._sweep(final)
        work = final.with_name(f"{final.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        work.mkdir()
        module, _, name = stage.function.partition(":")
        unfinished = _begun(key) if stage.resumes else None
        if kept is not None and not stage.keeps:  # what comes needs the memory
            kept.release()
        note = journal.Note(self.root, stage=stage.name, key=key.value[:16])
        note.write("began")
        try:
            with Meter() as meter:
                function = getattr(import_module(module), name)
                result: R = function(config, inputs, work, Context(watch, unfinished, kept))
            manifest = {
                "key": key.value,
                **key.what,
                "content": content(work, self._memo),
                "files": seal(work, self._memo),
                "result": asdict(result),  # type: ignore[call-overload]
                "cost": meter.cost(),
                "host": socket.gethostname(),
                "paths": {k: str(v.path) for k, v in inputs.items()},
            }
            manifest = json.loads(json.dumps(manifest))
            write_text(work / MANIFEST, json.dumps(manifest | {"seal": digest(manifest)}, indent=1))
            sync(work)
            if final.exists():  # forced: the old one stays until this moment, and goes aside whole
                final.rename(final.with_name(f"{final.name}.tmp-old"))
            work.rename(final)  # the moment from which it exists
            self._sweep(final)
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            note.write("made")
        except BaseException as e:
            note.write("preempted" if isinstance(e, Preempted) else "failed")
            shutil.rmtree(work, ignore_errors=True)  # failures are never results
            raise
        finally:
            # half a second once the libraries are loaded: for nothing where the model stays, or
            # none was there
            if stage.devices != "none" and not stage.keeps:
                free_memory()
        return _artifact(stage, final, manifest, reused=False)

    @property
    def _memo(self) -> Path:
        return self.root / ".content"

    def _found(self, stage: Stage[R], key: Key) -> Artifact[R] | None:
        """The finished artifact, if it is there and whole."""
        manifest = read_manifest(key.folder)
        if manifest is None or manifest["key"] != key.value:
            return None
        damaged = self._damaged(key.folder, manifest)
        return None if damaged else _artifact(stage, key.folder, manifest, reused=True)

    def _damaged(self, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
        """Files of an artifact that are not what its stage wrote. An artifact from before hashes
        were kept is not checked."""
        if str(folder) in self._whole:
            return []
        found = broken(folder, manifest.get("files", {}), None if self.verify else self._memo)
        if not found:
            self._whole.add(str(folder))
        return found

    def _set_aside(self, final: Path, watch: Watch) -> None:
        damaged, aside = self.damaged(final), self.set_aside(final)
        watch.say(f"{final} is damaged ({some(damaged)}): set aside as {aside.name}, made again")

    def _sweep(self, final: Path) -> None:
        """While the claim is held nobody else makes this artifact: what lies beside it was left by
        a process that was killed."""
        for left in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What an artifact's folder says of itself; None where it says nothing, or was changed."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    needed = {"key", "content", "result", "cost", "stage"}
    if not isinstance(found, dict) or not needed <= found.keys():
        return None
    sealed = found.pop("seal", None)
    return found if sealed is None or sealed == digest(found) else None


def _artifact(
    stage: Stage[R], folder: Path, manifest: Mapping[str, Any], reused: bool
) -> Artifact[R]:
    key, content, cost = (manifest[name] for name in ("key", "content", "cost"))
    result = stage.restored(manifest["result"])
    return Artifact(folder, key, content, result, cost, reused, stage.name)


def _begun(key: Key) -> Path:
    """The folder of an unfinished stage, with what it is the beginning of."""
    key.unfinished.mkdir(exist_ok=True)
    if not (key.unfinished / BEGUN).is_file():
        write_text(key.unfinished / BEGUN, json.dumps(key.what, indent=1))
    return key.unfinished


def free_memory() -> None:
    """A stage's models are held by reference cycles, which on a GPU nothing else would collect
    before the next models are loaded."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
