"""Files appear whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    beside.replace(path)


def sync(folder: Path) -> None:
    """Brings every file of a folder to the disk, before a rename declares it whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
