"""All devices of a hardware profile, each with its engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

from paw.errors import StageError
from paw.evaluation.engine import Engine, Job
from paw.evaluation.plan import Batch
from paw.models.load import Runtime, spreads
from paw.store import Watch, peak_gpu, reset_gpu, stop, tell_gpu


@dataclass
class Engines:
    """The devices of a hardware profile: one in this process, several each in a process of its
    own, or all in this process where a base is spread over them. They are kept from one evaluation
    to the next, with the base they hold."""

    _one: Engine = field(default_factory=Engine)
    _workers: list[ProcessPoolExecutor] = field(default_factory=list)

    def run(
        self, job: Job, batches: Sequence[Batch], watch: Watch
    ) -> Iterator[tuple[int, list[Any]]]:
        """Every batch's number and results, as they are done."""
        total, done, told = sum(map(len, batches)), 0, set[str]()
        for i, results, notes in self._results(job, batches):
            for note in notes:
                if note not in told:
                    told.add(note)
                    watch.say(note)
            done += len(results)
            watch.progress(done, total, "questions")
            yield i, results

    def release(self) -> None:
        """Gives the memory back, before something else needs it."""
        self._stop()
        self._one.release()

    def _results(
        self, job: Job, batches: Sequence[Batch]
    ) -> Iterator[tuple[int, list[Any], list[str]]]:
        count = min(_devices(job.runtime), len(batches))
        if spreads(job.runtime, job.base.path):
            self._stop()  # what they hold would be in its way
            count = 1
        if count <= 1:
            for i, batch in enumerate(batches):
                yield i, self._one.run(job, batch), self._one.notes
                self._one.notes = []
            return
        if self._one.places:  # on each of the devices
            self._one.release()
        self._start(job.runtime)
        futures: dict[Future[tuple[list[Any], list[str], float | None]], int] = {}
        try:
            for i, batch in enumerate(batches):
                futures[self._workers[i % count].submit(_in_worker, job, batch)] = i
            for future in as_completed(futures):
                results, notes, gpu = future.result()
                tell_gpu(f"cuda:{futures[future] % count}", gpu)
                yield futures[future], results, notes
        except BrokenProcessPool:
            self._workers.clear()
            raise StageError(
                "evaluate: the process of one device died, perhaps for want of memory. "
                "Set evaluate.batch_tokens lower, or hardware.devices=1."
            ) from None
        finally:
            for future in futures:
                future.cancel()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.shutdown()
        self._workers.clear()

    def _start(self, runtime: Runtime) -> None:
        from multiprocessing import get_context

        while len(self._workers) < _devices(runtime):
            device = f"cuda:{len(self._workers)}" if runtime.device == "cuda" else runtime.device
            threads = max(1, (os.cpu_count() or 1) // runtime.devices)
            self._workers.append(
                ProcessPoolExecutor(1, get_context("spawn"), _begin, (device, threads))
            )


def _devices(runtime: Runtime) -> int:
    """The profile's, of those that a scheduler has given this process."""
    if runtime.device != "cuda" or runtime.devices == 1:
        return runtime.devices
    import torch

    return max(1, min(runtime.devices, torch.cuda.device_count()))


_ENGINE = Engine()  # of a worker process
_DEVICE = "cpu"


def _begin(device: str, threads: int) -> None:
    """A worker's start: its device, and its share of the processor."""
    import torch

    global _DEVICE
    _DEVICE = device
    stop.deaf()
    if device == "cpu":
        torch.set_num_threads(threads)


def _in_worker(job: Job, batch: Batch) -> tuple[list[Any], list[str], float | None]:
    """Results, notes, and the peak of GPU memory (MiB)."""
    job = replace(job, runtime=replace(job.runtime, device=_DEVICE, devices=1))
    reset_gpu()
    results, notes = _ENGINE.run(job, batch), _ENGINE.notes
    _ENGINE.notes = []
    return results, notes, peak_gpu()
