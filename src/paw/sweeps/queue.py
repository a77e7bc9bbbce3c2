"""Which jobs a cluster no longer knows, though they left no result.

submitit asks sacct, at intervals of minutes; where there is no accounting, it would wait for such a
job for ever.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Any

EVERY = 10.0  # seconds between questions
GRACE = 20.0  # seconds in which a result may still appear on a shared file system


class Lost:
    """Jobs that have ended without a result."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._missing: dict[str, float] = {}  # since when

    def among(self, jobs: Sequence[Any]) -> dict[str, str]:
        """Ids of submitit's jobs, and what became of each."""
        here = [job for job in jobs if hasattr(job, "_process")]
        local = {job.job_id: "its process was killed" for job in here if _died(job)}
        ids = [job.job_id for job in jobs if not hasattr(job, "_process")]
        now = time.monotonic()
        if not ids or now - self._asked < EVERY:
            return local
        self._asked = now
        there = _queued(ids)
        if there is None:  # the scheduler does not answer: nothing is known
            return local
        for one in ids:
            if one in there:
                self._missing.pop(one, None)
            else:
                self._missing.setdefault(one, now)
        gone = [i for i in ids if i in self._missing and now - self._missing[i] >= GRACE]
        why = "killed: the cluster's queue no longer has it, and it left no result"
        return local | dict.fromkeys(gone, why)


def _died(job: Any) -> bool:
    ended = job._process is not None and job._process.poll() is not None
    return ended and not job.paths.result_pickle.exists()


def _queued(ids: Sequence[str]) -> set[str] | None:
    """Those that wait or run; None where squeue cannot say."""
    arrays = sorted({i.partition("_")[0] for i in ids})
    command = ["squeue", "--noheader", "--array", "--format=%i %F_%K", "--jobs", ",".join(arrays)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split())
