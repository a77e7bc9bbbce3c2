"""Files appear whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside, of this thread alone; what was written there takes the place of `path` at the
    end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    beside = path.with_name(f".{path.name}.{writer}")
    yield beside
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync(folder: Path) -> None:
    """Brings every file of a folder to the disk, before a rename declares it whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
