"""What every process has made in a store, and when: <root>/.journal/<host>-<process>.jsonl.

A file per process: over NFS two hosts must not append to one.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = ".journal"


@dataclass(frozen=True)
class Note:
    """One making of one artifact."""

    root: Path
    stage: str
    key: str
    began: float = field(default_factory=time.time)

    def write(self, what: str) -> None:
        """
        Args:
            what: began, made, failed or preempted; a process that was killed has only begun.
        """
        me = f"{socket.gethostname()}-{os.getpid()}"
        now = time.time()
        entry = {
            "time": now,
            "what": what,
            "stage": self.stage,
            "key": self.key,
            "seconds": round(now - self.began, 3),
            "by": me,
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        file = self.root / FOLDER / f"{me}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with open(file, "a") as f:
            f.write(json.dumps(entry) + "\n")


def read(root: Path) -> list[Mapping[str, Any]]:
    """All notes of all processes, in order of time."""
    found = []
    for file in (root / FOLDER).glob("*.jsonl"):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda note: note["time"])
