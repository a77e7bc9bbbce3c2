"""The tasks of a cluster job that spans several nodes: the first does the job, others follow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus

from paw.training import nodes


def leads() -> bool:
    """Whether this task is the job's first."""
    from submitit import JobEnvironment

    return bool(JobEnvironment().global_rank == 0)


@contextmanager
def first_of_nodes() -> Iterator[None]:
    """The first task of a job, with the others behind it where there are any."""
    from submitit import JobEnvironment

    if JobEnvironment().num_nodes == 1:
        yield
        return
    with nodes.first(_folder()):
        yield


def followed() -> JobReturn:
    """Any other task, until the first has ended."""
    from submitit import JobEnvironment

    from paw.training.processes import take_part

    nodes.follow(_folder(), partial(take_part, node=JobEnvironment().node))
    return JobReturn(status=JobStatus.COMPLETED)


def _folder() -> Path:
    """Where the nodes of this job meet; after it was requeued, another."""
    from submitit import JobEnvironment

    again = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Path(JobEnvironment().paths.folder) / f"nodes-{JobEnvironment().raw_job_id}-{again}"
