"""Sixteen processes that want one graph, some of which are killed: `python race.py STORE SEED`.

Each process that was killed is started again, until all have every result. Prints the results of
each process, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.graph import Execution, Source, Step, execute
from paw.store import Input, Stage, Store

PROCESSES, KILLS = 16, 24


@dataclass(kw_only=True)
class Added:
    number: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sum:
    total: int


def add(config: Added, inputs: Mapping[str, Input], out: Path, context: Any) -> Sum:
    """Writes two files, with time to be killed between them."""
    total = config.number + sum(int((i.path / "sum.txt").read_text()) for i in inputs.values())
    (out / "sum.txt").write_text(str(total))
    time.sleep(config.seconds)
    (out / "again.txt").write_text(str(total))
    return Sum(total=total)


ADD = Stage("add", "1", "race:add", config=Added, result=Sum)


class Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: None


def graph() -> list[Step[Sum]]:
    """Three layers of four steps, of which each reads two of the layer before."""
    layers: list[list[Step[Sum]]] = []
    for depth in range(3):
        layer = []
        for i in range(4):
            inputs: dict[str, Source | Step[Sum]] = {}
            if depth:
                inputs = {"a": layers[-1][i], "b": layers[-1][(i + 1) % 4]}
            config = Added(number=10**depth + i, seconds=0.02)
            layer.append(Step(stage=ADD, name=f"{depth}.{i}", config=config, inputs=inputs))
        layers.append(layer)
    return layers[-1]


def work(root: Path, report: Path) -> None:
    import paw.graph.execute as executor

    executor.POLL = 0.01
    execution = Execution(graph(), Store(root))
    execute(execution, Quiet())  # type: ignore[arg-type]
    found = {step.name: execution[step].result.total for step in execution.steps}
    report.with_suffix(".new").write_text(json.dumps(found))
    os.replace(report.with_suffix(".new"), report)


def holders(root: Path) -> set[int]:
    """The processes that make something now."""
    found = set()
    for claim in root.glob("add/*.claim"):
        with contextlib.suppress(OSError, ValueError):
            found.add(json.loads(claim.read_text())["pid"])
    return found


def main(root: Path, seed: int) -> None:
    draw, running = random.Random(seed), dict[int, Path]()
    reports = [root.parent / f"{root.name}-{i}.json" for i in range(PROCESSES)]

    def start(report: Path) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(root, report)
                code = 0
            finally:
                os._exit(code)
        running[pid] = report

    for report in reports:
        start(report)
    kills, end = KILLS, time.monotonic() + 60
    while running:
        assert time.monotonic() < end, "nobody gets on"
        if kills and draw.random() < 0.5:
            kills -= 1
            working = sorted(holders(root) & running.keys())
            some = working if working and draw.random() < 0.5 else sorted(running)
            os.kill(draw.choice(some), signal.SIGKILL)
        time.sleep(draw.random() * 0.01)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            report = running.pop(pid)
            if not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
                assert os.WIFSIGNALED(status), "a process failed by itself"
                start(report)
    for report in reports:
        print(report.read_text())


if __name__ == "__main__":
    sys.modules["race"] = sys.modules["__main__"]  # the stage's function is found by this name
    main(Path(sys.argv[1]), int(sys.argv[2]))
