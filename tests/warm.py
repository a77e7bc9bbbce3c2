"""`python -m paw.run` without the wait for its imports: each command is a process of its own,
forked from one that has imported what commands import. Half of a small run's time is imports, and
the tests have hundreds.

Tests of how a process starts and of what it imports start a real one. Where there is a GPU all
are: CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

IMPORTED = [
    "paw.tasks.pipeline",
    "paw.training.fit",
    "paw.evaluation.engine",
    "paw.transfer.transfer",
    "paw.transfer.gate",
    "paw.refine.refine",
    "paw.report.page",
    "paw.sweeps.launch",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "peft.tuners.lora",
]
START = "spawn" if torch.cuda.is_available() else "forkserver"
_processes: Any = multiprocessing.get_context(START)
_processes.set_forkserver_preload(IMPORTED)


class Command:
    """`python -m paw.run ARGS` in `cwd`, begun, without input. `env` is added to this process's
    environment: what is read while modules are imported is not among it."""

    def __init__(
        self, args: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._args = ["paw.run", *args]
        self._said = tempfile.TemporaryDirectory(prefix="said-")
        ask = (list(args), str(cwd), {**os.environ, **(env or {})}, self._said.name)
        self._process = _processes.Process(target=_command, args=ask)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    def kill(self) -> None:
        """With all that it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """
        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        self._process.join(timeout)
        if self.running:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self._args, timeout, self.stdout())
        said = (self._read("stdout"), self._read("stderr"))
        return subprocess.CompletedProcess(self._args, self._process.exitcode or 0, *said)

    def _read(self, stream: str) -> str:
        file = Path(self._said.name, stream)  # there once the process is
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def run(
    args: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return Command(args, cwd, env).wait()


def _command(args: list[str], cwd: str, environment: dict[str, str], said: str) -> None:
    gc.freeze()  # as conftest does
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_CREAT, 0o600), stream)
    sys.argv = ["paw.run", *args]
    try:
        runpy.run_module("paw.run", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
