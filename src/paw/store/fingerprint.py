"""What a result depends on, as a hash: the configuration without transient fields, and the inputs
by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paw.errors import StageError
from paw.store.write import write_text

CHUNK = 1 << 20
# A folder is its weights, configs, tokenizer and rows; a README beside them changes nothing.
TEXT_FILES = (".json", ".jinja", ".txt", ".jsonl", ".py")
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".model", ".gz", ".npy", *TEXT_FILES)


def plain(obj: Any) -> Any:
    """A configuration as JSON types. Transient fields are left out, and so are fields at their
    default: a field that is added later keeps old results valid.

    Raises:
        TypeError: for a value whose text is not stable, such as an object.
    """
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        out = {}
        for f in dataclasses.fields(obj):
            value = getattr(obj, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if not f.metadata.get("transient") and value != default:
                out[f.name] = plain(value)
        return out
    if isinstance(obj, Mapping):
        return {str(k): plain(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    raise TypeError(f"a stage's config may not hold {type(obj).__name__}")


def digest(obj: Any) -> str:
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def content(path: Path, memo: Path) -> str:
    """The hash of a file's or folder's content. `memo` is a folder that remembers files by what the
    file system says of them: sixteen gigabytes are read once, and not again where a folder was only
    renamed."""
    if path.is_dir():
        files = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.suffix in MODEL_FILES}
        # .cache holds the hub client's own notes
        used = {n: p for n, p in files.items() if ".cache" not in n.parts and p.is_file()}
        if not used:
            raise StageError(
                f"{path}: holds none of the files that a model, data set or adapter is made of."
            )
        return digest({str(name): content(p, memo) for name, p in used.items()})
    known = memo / stamp(path)
    if known.is_file():
        return known.read_text()
    value = sha256([path])
    write_text(known, value)
    return value


def stamp(file: Path) -> str:
    """A file as its file system knows it. The time of its last change is part of it, which nobody
    can set back: archives unpack files with the times that they had, and inodes are used again."""
    stat = file.stat()
    return digest([stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])


def seal(folder: Path, memo: Path) -> dict[str, str]:
    """The hash of every file of a folder, by its path in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): content(p, memo) for p in files}


def broken(folder: Path, sealed: Mapping[str, str], memo: Path | None) -> list[str]:
    """The files of a sealed folder that are missing or not what they were. Content is read where
    size or times have changed; without a memo, in any case."""

    def same(file: Path, value: str) -> bool:
        try:
            return (content(file, memo) if memo else sha256([file])) == value
        except OSError:  # gone, perhaps at this moment by another process that makes it anew
            return False

    return [name for name, value in sealed.items() if not same(folder / name, value)]


def sha256(files: Sequence[Path]) -> str:
    """The checksum of files joined in order."""
    value = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while chunk := f.read(CHUNK):
                value.update(chunk)
    return value.hexdigest()
