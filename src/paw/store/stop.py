"""Ending in good order when a machine is needed elsewhere: a scheduler's signal, or a time limit
that is near."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(BaseException):
    """The process was asked to end. No Exception: nothing that mends failures may catch it."""

    def __str__(self) -> str:
        return "asked to end; finished steps are kept, a training resumes from its last step"


_asked = False  # this process was told
_event: Any = None  # set by the process that started this one, where there is such
_patient = 0  # how many callers end by themselves, at a better moment


def asked() -> bool:
    """Whether to end at the next good moment."""
    return _asked or (_event is not None and _event.is_set())


def follow(event: Any) -> None:
    """Makes `asked` true in this process as soon as its parent's event is set."""
    global _event
    _event = event


@contextmanager
def patiently() -> Iterator[None]:
    """For work that looks at `asked` itself, keeps what it has, and raises Preempted then. All
    other work is interrupted where it is: it leaves nothing half-written."""
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


@contextmanager
def ends_on(*signals: int) -> Iterator[None]:
    """Signals that ask this process to end. Main thread only, as all of Python's signals are."""
    global _asked
    before = {number: signal.signal(number, _ask) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False


def deaf() -> None:
    """For a process that another one started: schedulers signal all of a job's processes, and this
    one ends when its parent says so, or with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _ask(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    if not _patient:
        raise Preempted
