"""The signal by which submitit's jobs learn that their time on a machine ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paw.store import Preempted, stop


@contextmanager
def ends_in_good_order() -> Iterator[None]:
    """In a job's process: on the signal, a training keeps its last step and everything else stops
    where it is; then submitit requeues the job."""
    from submitit.core.job_environment import JobEnvironment

    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")  # $SUBMITIT_PREEMPT_SIGNAL, or USR2
    requeue: Any = signal.getsignal(number)
    try:
        with stop.ends_on(number):
            yield
    except Preempted:
        requeue(number, None)  # submitit's: it asks for a checkpoint, requeues and exits
        raise
