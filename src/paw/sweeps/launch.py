"""All jobs of a sweep, launched and waited for: one after the other in this process, several at
once on this machine, or by a cluster's scheduler."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from paw.config.common import RunConfig
from paw.errors import ConfigError, StageError
from paw.graph import steps_of
from paw.launch.outline import outline_of
from paw.sweeps import queue
from paw.sweeps.folder import Job, State, set_state, state_in, write_jobs
from paw.text import first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from hydra_plugins.paw_launchers import Submitted

POLL = 1.0  # seconds between looks at jobs
Returned = Sequence[JobReturn]


def one_by_one(
    config: DictConfig,
    overrides: Sequence[Sequence[str]],
    first: int,
    run: Callable[[int, Sequence[str]], JobReturn],
) -> Returned:
    """In this process. A job that fails leaves the others to run.

    Raises:
        StageError: at the end, where any failed.
    """
    configured = _jobs(config, overrides, first)
    _refuse_steps(configured)
    jobs = [job for job, _ in configured]
    _write(config, "in this process", jobs)
    names, done = _names(jobs), []
    for job in jobs:
        print(f"\n[{job.number + 1}/{first + len(jobs)}] {names[job.number]}", flush=True)
        done.append(run(job.number, _placed(job)))
    return _concluded(config, jobs, done)


def submitted(
    launcher: Submitted, config: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> Returned:
    """By submitit. What they leave is waited for; jobs go on where this process is ended.

    Raises:
        StageError: at the end, where any failed.
    """
    configured = _jobs(config, overrides, first)
    jobs, folder = [job for job, _ in configured], Path(str(config.hydra.sweep.dir))
    on_slurm, names = launcher._EXECUTOR == "slurm", _names(jobs)
    where = "slurm" if on_slurm else "a local pool"
    print(f"{len(jobs)} job{'s' * (len(jobs) > 1)} for {where}, in {folder}", flush=True)
    running: dict[int, Any] = {}
    if not on_slurm:
        _refuse_steps(configured)
        batches = _windows(launcher, jobs, running)
    elif configured[0][1].dispatch == "steps":
        batches = _steps(launcher, configured, running, _config_dir(config))
    else:
        batches = _arrays(launcher, jobs, running)
    try:
        for batch in batches:
            known = [replace(j, id=s.job_id, log=str(s.paths.stdout)) for j, s in batch]
            _write(config, where, known)
            for job in known:
                log = os.path.relpath(job.log or "")
                print(f"  {names[job.number]}\n      job {job.id}, log {log}", flush=True)
        _wait(jobs, running, names)
    except KeyboardInterrupt:
        page = f"python -m paw.run task=report sweep={folder}"
        rest = "they go on; cancel them with scancel" if on_slurm else "they were ended"
        if not on_slurm:
            for one in running.values():
                one.cancel()
        print(f"\nstopped waiting for the jobs: {rest}. {page} says how far they are.")
        raise
    return _concluded(config, jobs, [_returned(job, running[job.number]) for job in jobs])


# ---- before ---------------------------------------------------------------------------------


def _jobs(
    config: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> list[tuple[Job, RunConfig]]:
    """The jobs, every one checked before any of them is launched.

    Raises:
        ConfigError: for the first that cannot be composed.
    """
    from paw.cli.compose import configs

    folder = Path(str(config.hydra.sweep.dir))
    found = configs([list(one) for one in overrides], _config_dir(config))
    return [
        (Job(number=i, overrides=list(one), folder=folder / f"{i}_{_label(c)}"), c)
        for i, (one, c) in enumerate(zip(overrides, found, strict=True), first)
    ]


def _config_dir(config: DictConfig) -> str | None:
    """What --config-dir names."""
    sources = config.hydra.runtime.config_sources
    return next((str(s.path) for s in sources if s.provider == "command-line"), None)


def _refuse_steps(configured: Sequence[tuple[Job, RunConfig]]) -> None:
    """
    Raises:
        ConfigError: where jobs of steps are asked for, and there is no scheduler to order them.
    """
    if any(c.dispatch == "steps" for _, c in configured):
        raise ConfigError(
            "dispatch=steps: needs a hardware profile that submits to Slurm (hardware=slurm_…). "
            "Leave it out: jobs share their steps anyway."
        )


def _label(c: Any) -> str:
    """What a job is about, for its folder and its name in the queue."""
    models = (getattr(c, side).name for side in ("source", "target") if hasattr(c, side))
    about = "-".join(models) if c.task == "pipeline" else "_".join([c.task, *models])
    return re.sub(r"[^\w.-]+", "_", about)[:100]


def _names(jobs: Sequence[Job]) -> dict[int, str]:
    """Each job's folder, with the overrides that not all of them have."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return {
        job.number: " ".join([job.folder.name, *(o for o in job.overrides if o not in shared)])
        for job in jobs
    }


def _placed(job: Job) -> list[str]:
    """Its overrides, and where Hydra runs it."""
    return [*job.overrides, f"hydra.sweep.subdir={job.folder.name}"]


def _write(config: DictConfig, launcher: str, jobs: Sequence[Job]) -> None:
    command = shlex.join(["python", "-m", "paw.run", *sys.argv[1:]])
    write_jobs(Path(str(config.hydra.sweep.dir)), command, launcher, jobs)


# ---- submitting -----------------------------------------------------------------------------


def _executor(launcher: Submitted, name: str, params: Mapping[str, Any] | None = None) -> Any:
    """submitit's, with what the hardware profile sets, or with other parameters."""
    import submitit

    kind, params = launcher._EXECUTOR, dict(params or launcher.params)
    for key in ("workers", "name"):
        params.pop(key, None)
    if kind == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "hardware: this profile submits to Slurm, and there is no srun here. Choose another, "
            "or a machine that submits."
        )
    folder, most = params.pop("submitit_folder"), params.pop("max_num_timeout", None)
    more = {} if most is None else {f"{kind}_max_num_timeout": most}
    executor = submitit.AutoExecutor(folder=folder, cluster=kind, **more)
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"}
    common |= {"stderr_to_stdout"}
    named = {k if k in common else f"{kind}_{k}": v for k, v in params.items() if v is not None}
    executor.update_parameters(name=name, **named)
    return executor


@contextmanager
def _refusal() -> Iterator[None]:
    """
    Raises:
        StageError: what the scheduler says against a submission, in a line.
    """
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as e:
        raise StageError(
            f"the cluster refuses the job: {first_line(e)}. hydra.launcher.… sets what is asked of "
            "it: partition, account, gpus_per_node, mem_gb, timeout_min."
        ) from None


Batches = Iterator[list[tuple[Job, Any]]]


def _arrays(launcher: Submitted, jobs: Sequence[Job], running: dict[int, Any]) -> Batches:
    """A job array for each pair of models, which gives it its name."""
    pairs: dict[str, list[Job]] = {}
    for job in jobs:
        pairs.setdefault(job.folder.name.partition("_")[2], []).append(job)
    for pair, several in pairs.items():
        executor = _executor(launcher, f"paw_{pair}")
        arguments = zip(*map(_arguments, several), strict=True)
        with _refusal():
            made = executor.map_array(launcher, *arguments)
        running |= {job.number: one for job, one in zip(several, made, strict=True)}
        yield list(zip(several, made, strict=True))


def _steps(
    launcher: Submitted,
    configured: Sequence[tuple[Job, RunConfig]],
    running: dict[int, Any],
    config_dir: str | None,
) -> Batches:
    """A job for each step that is missing, after those it needs; then those that report."""
    from paw.sweeps import steps

    made: dict[str, str] = {}  # the job of each step
    found = [(job.overrides, c) for job, c in configured]
    for one in steps.missing(found, config_dir):
        params = steps.asked(launcher.params, one.devices, one.of)
        after = [made[node.identity] for node in one.step.needs if node.identity in made]
        job = _submit(launcher, one.name, params, after, one.job)
        made[one.step.identity] = job.job_id
        behind = f" after {', '.join(after)}" if after else ""
        print(f"  job {job.job_id}: {one.step.name}, {one.devices} devices{behind}", flush=True)
    for job, c in configured:
        params = steps.asked(launcher.params, 0, c.hardware.devices)
        needed = steps_of(outline_of(c, "dispatch").nodes)
        after = [made[step.identity] for step in needed if step.identity in made]
        name, call = f"paw_{job.folder.name}", (launcher, *_arguments(job))
        running[job.number] = _submit(launcher, name, params, after, *call)
        yield [(job, running[job.number])]


def _submit(
    launcher: Submitted,
    name: str,
    params: Mapping[str, Any],
    after: Sequence[str],
    *call: Any,
) -> Any:
    """A single job, which ends where one of those before it failed."""
    more = {**params["additional_parameters"], "kill-on-invalid-dep": "yes"}
    behind = {"dependency": f"afterok:{':'.join(after)}"} if after else {}
    executor = _executor(launcher, name, {**params, **behind, "additional_parameters": more})
    with _refusal():
        return executor.submit(*call)


def _windows(launcher: Submitted, jobs: Sequence[Job], running: dict[int, Any]) -> Batches:
    """As many at once as the pool has workers."""
    executor = _executor(launcher, "paw")
    for job in jobs:
        while sum(not one.done() for one in running.values()) >= launcher.params["workers"]:
            time.sleep(POLL / 4)
        running[job.number] = executor.submit(launcher, *_arguments(job))
        yield [(job, running[job.number])]


def _arguments(job: Job) -> tuple[Any, ...]:
    """Of the launcher's call in the job's process."""
    state = Singleton.get_state()
    return _placed(job), "hydra.sweep.dir", job.number, f"job_{job.number}", state


# ---- waiting --------------------------------------------------------------------------------


def _wait(jobs: Sequence[Job], running: Mapping[int, Any], names: Mapping[int, str]) -> None:
    """Until all have ended. One that has ended without a word is said to have failed."""
    lost, left = queue.Lost(), list(jobs)
    while left:
        gone = lost.among([running[job.number] for job in left])
        for job in list(left):
            one = running[job.number]
            if one.paths.result_pickle.exists() or one.job_id in gone:
                left.remove(job)
                state = state_in(job.folder) or State(state="failed")
                if one.job_id in gone and state.ended is None:
                    why = gone[one.job_id]
                    state = replace(state, state="failed", error=why, ended=time.time())
                    set_state(job.folder, state)
                count = f"[{len(jobs) - len(left)}/{len(jobs)}]"
                print(f"{count} {state.state}  {names[job.number]}", flush=True)
        time.sleep(POLL)


def _returned(job: Job, one: Any) -> JobReturn:
    """What a job's process returned, or why it did not."""
    from submitit.core.utils import pickle_load

    if one.paths.result_pickle.exists():
        how, what = pickle_load(one.paths.result_pickle)
        if how == "success":
            done: JobReturn = what
            return done
    state = state_in(job.folder)
    why = (state and state.error) or f"its process failed before it began, see {one.paths.stderr}"
    return JobReturn(status=JobStatus.FAILED, _return_value=StageError(why))


# ---- after ----------------------------------------------------------------------------------


def _concluded(config: DictConfig, jobs: Sequence[Job], done: list[JobReturn]) -> Returned:
    """Prints the page.

    Raises:
        StageError: where any job failed.
    """
    from paw.sweeps.report import report

    print(f"\n{report(Path(str(config.hydra.sweep.dir)))}", flush=True)
    failed = [
        (job, one) for job, one in zip(jobs, done, strict=True) if one.status != JobStatus.COMPLETED
    ]
    if failed:
        job, one = failed[0]
        raise StageError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first is {job.folder.name}: "
            f"{one._return_value}"
        )
    return done
