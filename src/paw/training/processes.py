"""The same work in several processes, one for each device, that this one starts and watches; those
of other nodes are started there."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from paw.errors import PawError, StageError
from paw.store import Preempted, Watch, peak_gpu, stop, tell_gpu
from paw.training.nodes import Meeting, invited

Work = Callable[[Watch, int], None]  # (who is told, rank); it is sent to other processes
LOOPBACK = "127.0.0.1"
START = "spawn"  # CUDA does not survive a fork


def run(work: Work, world: int, device: str, watch: Watch, nodes: int = 1) -> None:
    """
    Args:
        world: processes of all nodes.

    Raises:
        PawError: what one of the processes raised; the others are ended then.
        StageError: where one was ended from outside.
        Preempted: where this process was asked to end, when they have kept what they did.
    """
    port = _free_port()
    if nodes == 1:
        place = Place(rank=0, of=world, world=world, device=device, address=LOOPBACK, port=port)
        _run(work, place, watch)
        return
    with invited((work, world, device), nodes, port) as meeting:
        _run(work, _place(world, device, meeting, 0), watch, meeting.wrong)


def take_part(invitation: tuple[Work, int, str], meeting: Meeting, node: int) -> None:
    """This node's processes of a training that another node began. What goes wrong here is told
    there."""
    work, world, device = invitation

    def ended() -> BaseException | None:
        return Ended() if meeting.over() else None

    try:
        _run(work, _place(world, device, meeting, node), _Nobody(), ended)
    except Ended:
        pass
    except BaseException as e:
        meeting.tell(e)


class Ended(Exception):
    """The first node's processes have ended."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A node's processes among all."""

    rank: int  # of the node's first
    of: int  # processes of the node
    world: int
    device: str
    address: str
    port: int


def _place(world: int, device: str, meeting: Meeting, node: int) -> Place:
    of, address, port = world // meeting.nodes, meeting.address, meeting.port
    return Place(rank=node * of, of=of, world=world, device=device, address=address, port=port)


def _run(
    work: Work,
    place: Place,
    watch: Watch,
    elsewhere: Callable[[], BaseException | None] = lambda: None,
) -> None:
    """
    Args:
        elsewhere: what has happened on other nodes, if it ends this one's processes.
    """
    mp: Any = import_module("torch.multiprocessing")

    starting = mp.get_context(START)
    queue, ending = starting.SimpleQueue(), starting.Event()
    args = (work, place, queue, ending)
    context = mp.start_processes(_process, args, nprocs=place.of, join=False, start_method=START)
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
            if not ended or wrong is not None:
                # what happened first is the cause: a lost connection only follows from it
                there = elsewhere()
                ended, wrong = ended or there is not None, there or wrong
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    if wrong is not None:
        raise wrong


class _Nobody:
    """A Watch for processes of other nodes: the first says all there is to say."""

    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def say(self, text: str) -> None: ...


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


def _process(local: int, work: Work, place: Place, queue: Any, ending: Any) -> None:
    import torch

    stop.deaf()
    stop.follow(ending)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    where = {"LOCAL_RANK": str(local), "NODE_RANK": str(place.rank // place.of)}
    os.environ |= where | {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    if place.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // place.of))
    try:
        work(_Told(queue), place.rank + local)
        queue.put(("gpu", (f"cuda:{local}", peak_gpu())))
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
