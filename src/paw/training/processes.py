"""The same work in several processes, one for each device, that this one starts and watches."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from paw.errors import PawError, StageError
from paw.store import Preempted, Watch, peak_gpu, stop, tell_gpu

Work = Callable[[Watch, int], None]  # (who is told, rank); it is sent to other processes


def run(work: Work, world: int, device: str, watch: Watch) -> None:
    """
    Raises:
        PawError: what one of the processes raised; the others are ended then.
        StageError: where one was ended from outside.
        Preempted: where this process was asked to end, when they have kept what they did.
    """
    mp: Any = import_module("torch.multiprocessing")

    spawning = mp.get_context("spawn")
    queue, ending = spawning.SimpleQueue(), spawning.Event()
    args = (work, world, device, queue, ending, _free_port())
    context = mp.start_processes(_process, args, nprocs=world, join=False, start_method="spawn")
    wrong: BaseException | None = None
    try:
        ended = False
        while not ended:
            if stop.asked():
                ending.set()
            try:
                ended = context.join(timeout=0.2, grace_period=3)
            except mp.ProcessRaisedException as e:
                ended, wrong = True, wrong or e
            except mp.ProcessExitedException as e:
                why = str(e).splitlines()[0]
                ended = True
                wrong = wrong or StageError(f"train: a process was ended from outside ({why}).")
            while not queue.empty():
                kind, what = queue.get()
                if kind == "wrong":
                    wrong = what
                elif kind == "gpu":
                    tell_gpu(*what)
                else:
                    getattr(watch, kind)(*what)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    if wrong is not None:
        raise wrong


class _Told:
    """A Watch that tells the process that started this one."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._queue.put(("progress", (done, total, note)))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._queue.put(("metrics", (dict(values), step)))

    def say(self, text: str) -> None:
        self._queue.put(("say", (text,)))


def _process(
    rank: int, work: Work, world: int, device: str, queue: Any, ending: Any, port: int
) -> None:
    import torch

    stop.deaf()
    stop.follow(ending)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    try:
        work(_Told(queue), rank)
        queue.put(("gpu", (f"cuda:{rank}", peak_gpu())))
    except Preempted as e:
        queue.put(("wrong", e))
    except PawError as e:
        queue.put(("wrong", e))
        raise


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on: the next run of the same training would
    meet it in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
