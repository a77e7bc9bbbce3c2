"""A training over several nodes of one cluster job. The process of the first node does everything
else; those of the others take part in each training that it invites them to.

They meet in a folder that all nodes see, $PAW_NODES, which the launcher names:

    first           the first node's claim: without its heartbeat the others end
    <id>.training   what to take part in, and where its processes find each other
    <id>.ended      it is over
    <id>.wrong      what went wrong on another node
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.errors import ConfigError
from paw.store import Claims, replacing

VARIABLE, FIRST = "PAW_NODES", "first"
POLL = 0.2  # seconds between looks into the folder
PATIENCE = 600.0  # seconds until the first node's process has begun


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the processes of one training find each other."""

    folder: Path
    id: str
    address: str  # the first node's
    port: int
    nodes: int

    def over(self) -> bool:
        return (self.folder / f"{self.id}.ended").exists()

    def wrong(self) -> BaseException | None:
        """What went wrong on another node, if anything has."""
        file = self.folder / f"{self.id}.wrong"
        if not file.exists():
            return None
        found: BaseException = pickle.loads(file.read_bytes())
        return found

    def tell(self, error: BaseException) -> None:
        _write(self.folder / f"{self.id}.wrong", error)


@contextmanager
def invited(work: Any, nodes: int, port: int) -> Iterator[Meeting]:
    """For as long as the block lasts, the other nodes take part in a training.

    Raises:
        ConfigError: where there are none.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        raise ConfigError(
            f"hardware.nodes={nodes}: needs a cluster job of {nodes} nodes: a profile such as "
            "hardware=slurm_nodes. Else set hardware.nodes=1."
        )
    address = os.environ.get("MASTER_ADDR") or socket.gethostname()
    meeting = Meeting(
        folder=Path(folder), id=uuid.uuid4().hex, address=address, port=port, nodes=nodes
    )
    _write(meeting.folder / f"{meeting.id}.training", (work, meeting))
    try:
        yield meeting
    finally:
        (meeting.folder / f"{meeting.id}.ended").touch()


@contextmanager
def first(folder: Path) -> Iterator[None]:
    """On the first node: the others stay for as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(folder)
    claim = Claims().take(folder / FIRST)
    assert claim is not None, f"{folder} is another job's"
    try:
        yield
    finally:
        claim.release()


def follow(folder: Path, take_part: Callable[[Any, Meeting], None]) -> None:
    """On any other node: takes part in every training, until the first node's process ends."""
    claims, seen, began = Claims(), set[Path](), time.monotonic()
    while not (folder / FIRST).exists():
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"the job's first node has not begun for {PATIENCE:.0f} s")
        time.sleep(POLL)
    while claims.holder(folder / FIRST) is not None:
        for file in set(folder.glob("*.training")) - seen:
            seen.add(file)
            work, meeting = pickle.loads(file.read_bytes())
            if not meeting.over():
                take_part(work, meeting)
        time.sleep(POLL)


def _write(file: Path, what: Any) -> None:
    """Pickled: from one process of the job to another, in the job's own folder."""
    with replacing(file) as beside:
        beside.write_bytes(pickle.dumps(what))
