"""The folder of a sweep: jobs.json says what was launched, a folder per job what became of it.

outputs/sweeps/<time>/
  jobs.json            the command, and every job with its overrides, folder, job id and log
  <n>_<pair>/job.json  running, done, failed or preempted, since when, on which host
  <n>_<pair>/…         as of any run: config.yaml, run.log, results.json, records/, adapters/
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from paw.errors import ConfigError, PawError
from paw.store import Preempted, write_text
from paw.text import first_line

JOBS, STATE = "jobs.json", "job.json"
TAIL = 20  # last lines of a failed job's log that are shown


@dataclass(frozen=True, kw_only=True)
class State:
    """What a job says of itself."""

    state: str  # running, done, failed, preempted
    error: str | None = None
    began: float = 0.0  # seconds since 1970
    ended: float | None = None
    host: str = ""
    devices: str = ""  # that the scheduler gave it, as CUDA numbers them
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration of a sweep."""

    number: int
    overrides: list[str]
    folder: Path
    id: str | None = None  # the cluster's
    log: str | None = None  # what the cluster or the pool keeps of its output
    state: State | None = None  # None: it has not begun
    # What its folder holds, where it does
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] | None = None

    def tail(self, lines: int = TAIL) -> str:
        """The last lines of its own log, or of the cluster's where it has none."""
        for file in (self.folder / "run.log", *([Path(self.log)] if self.log else [])):
            if file.is_file():
                return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
        return ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All jobs that one command launched."""

    folder: Path
    command: str
    launcher: str  # in this process, a local pool, slurm
    jobs: list[Job]


def write_jobs(folder: Path, command: str, launcher: str, jobs: Sequence[Job]) -> None:
    """Says what is launched. Jobs of an earlier batch stay (an optimising sweeper has several)."""
    file = folder / JOBS
    rows = json.loads(file.read_text())["jobs"] if file.is_file() else []
    known = {row["number"]: row for row in rows}
    for j in jobs:
        place = os.path.relpath(j.folder, folder)
        about = {"number": j.number, "overrides": j.overrides, "folder": place}
        known[j.number] = {**about, "id": j.id, "log": j.log}
    found = {"command": command, "launcher": launcher, "jobs": list(known.values())}
    write_text(folder / JOBS, json.dumps(found, indent=1) + "\n")


def read(folder: Path) -> Sweep:
    """A sweep as it stands now, ended or not.

    Raises:
        ConfigError: where a folder is none of a sweep.
    """
    try:
        said = json.loads((folder / JOBS).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"sweep: {folder} has no {JOBS}. Give the folder of a sweep, such as "
            "outputs/sweeps/2026-01-31_12-00-00."
        ) from None
    jobs = [_job(folder, row) for row in said["jobs"]]
    return Sweep(folder=folder, command=said["command"], launcher=said["launcher"], jobs=jobs)


def _job(folder: Path, row: dict[str, Any]) -> Job:
    place = folder / row["folder"]
    state, results, config = state_in(place), place / "results.json", place / "config.yaml"
    return Job(
        number=row["number"],
        overrides=row["overrides"],
        folder=place,
        id=row["id"],
        log=row["log"],
        state=state,
        config=yaml.safe_load(config.read_text()) if config.is_file() else {},
        results=json.loads(results.read_text()) if results.is_file() else None,
    )


def state_in(place: Path) -> State | None:
    """As the job has left it; of one of this host that was killed, that it was."""
    file = place / STATE
    if not file.is_file():
        return None
    found = State(**json.loads(file.read_text()))
    here = found.host == socket.gethostname()
    if found.state == "running" and here and not psutil.pid_exists(found.pid):
        return replace(found, state="failed", error="its process was killed")
    return found


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Keeps job.json while a job runs, whatever becomes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    now = State(
        state="running",
        began=time.time(),
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        devices=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        pid=os.getpid(),
    )
    set_state(folder, now)
    try:
        yield
    except BaseException as e:
        how = "preempted" if isinstance(e, Preempted) else "failed"
        said = str(e) if isinstance(e, PawError) else f"{type(e).__name__}: {first_line(e)}"
        set_state(folder, replace(now, state=how, error=said, ended=time.time()))
        raise
    set_state(folder, replace(now, state="done", ended=time.time()))


def set_state(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATE, json.dumps(asdict(state), indent=1) + "\n")
