"""The right to make an artifact, held by one process at a time, of any host that sees the folder.

A claim is a file that its holder touches every BEAT seconds. A holder on this host whose process
has ended is dead at once; any other is dead when its file was not touched for TIMEOUT seconds by
the clock of whoever waits, so that clocks need not agree. No locks of the file system are used:
over NFS they may be missing, or never be released.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

BEAT = 5.0  # seconds
TIMEOUT = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a claim."""

    place: str  # where its process number means something: a host, and a container of it
    pid: int
    began: float  # when the process did: numbers are used again
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.place.split('/')[0]}"


def place() -> str:
    with contextlib.suppress(OSError):
        # Hosts may have one name, and containers of one host number their processes on their own.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _began(pid: int) -> float:
    """When a process began, by a clock that nobody sets: on Linux in ticks since the system's
    start."""
    with contextlib.suppress(OSError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()


class Claims:
    """The claims of one process."""

    def __init__(self, beat: float = BEAT, timeout: float = TIMEOUT) -> None:
        self.beat, self.timeout = beat, timeout
        self._seen: dict[Path, tuple[str, float]] = {}  # last sign of life, and when it was new

    def take(self, file: Path) -> Claim | None:
        """The claim, or None where another process holds it. Does not wait."""
        me = Holder(place(), os.getpid(), _began(os.getpid()), uuid.uuid4().hex)
        if _create(file, me) or self._take_over(file, me):
            return Claim(file, me, self.beat)
        return None

    def holder(self, file: Path) -> Holder | None:
        """Who holds a claim and is alive, as far as is known."""
        found = _read(file)
        return None if found is None or self._dead(file, found[0]) else found[0]

    def _dead(self, file: Path, holder: Holder) -> bool:
        if holder.place == place():
            try:
                ended = psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE
                return ended or _began(holder.pid) != holder.began
            except psutil.NoSuchProcess:
                return True
        return self._silent(file)

    def _silent(self, file: Path) -> bool:
        """Whether a file has shown no sign of life since it was first looked at, for too long."""
        found = _read(file)
        if found is None:
            return False
        sign, now = f"{found[0].token} {found[1]}", time.monotonic()
        if self._seen.get(file, ("", 0))[0] != sign:
            self._seen[file] = (sign, now)
        return now - self._seen[file][1] > self.timeout

    def _take_over(self, file: Path, me: Holder) -> bool:
        """A dead holder's claim. Of several that want it, the one that makes the file of its token
        has it."""
        found = _read(file)
        if found is None or not self._dead(file, found[0]):
            return False
        mark = file.with_name(f"{file.name}.{found[0].token}")
        if not _create(mark, me):
            made = _read(mark)
            if made is not None and self._dead(mark, made[0]):  # it died in between
                _drop(mark, made[0])
            return False
        try:
            now = _read(file)
            if now is None or now[0].token != found[0].token:  # another was quicker
                return False
            beside = file.with_name(f"{file.name}.{me.token}.new")
            _create(beside, me)
            os.replace(beside, file)
            return True
        finally:
            mark.unlink(missing_ok=True)


class Claim:
    """A claim that is held; `release` gives it back."""

    def __init__(self, file: Path, me: Holder, beat: float) -> None:
        self._file, self._me = file, me
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat,), daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        if self._mine():
            self._file.unlink(missing_ok=True)

    def _beat(self, every: float) -> None:
        while not self._done.wait(every):
            with contextlib.suppress(OSError):
                if self._mine():
                    os.utime(self._file)

    def _mine(self) -> bool:
        found = _read(self._file)
        return found is not None and found[0].token == self._me.token


def _create(file: Path, holder: Holder) -> bool:
    """Makes a file that is not there, whole at once. Giving a second name to a file is done for one
    process only, over NFS, too; where a file system has no second names, its maker may be killed
    before it has said who it is."""
    text = json.dumps(asdict(holder))
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    beside.write_text(text)
    try:
        os.link(beside, file)
        return True
    except FileExistsError:
        return False
    except OSError:
        return _create_empty_first(file, text)
    finally:
        beside.unlink(missing_ok=True)


def _create_empty_first(file: Path, text: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as f:
        f.write(text)
    return True


def _drop(mark: Path, holder: Holder) -> None:
    """Removes a dead process's mark, and puts back that of another which was quicker."""
    gone = mark.with_name(f"{mark.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        os.rename(mark, gone)
        found = _read(gone)
        if found is not None and found[0].token != holder.token:
            with contextlib.suppress(FileExistsError):
                os.link(gone, mark)
        gone.unlink(missing_ok=True)


def _read(file: Path) -> tuple[Holder, int] | None:
    """Who a file names, and when it was touched. Opening it asks an NFS server anew."""
    try:
        with open(file) as f:
            touched, text = os.fstat(f.fileno()).st_mtime_ns, f.read()
    except OSError:
        return None
    try:
        return Holder(**json.loads(text)), touched
    except (ValueError, TypeError):  # it is being written, or its writer died in doing so
        return Holder("", 0, 0.0, "unreadable"), touched
