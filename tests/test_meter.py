"""What a stage used, counted over all the processes that it started."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

from paw.store import meter as meters
from paw.store.meter import Meter, peak_gpu, reset_gpu, tell_gpu, usage

HOLD = "import time; held = bytearray(300 * 2**20); print('held', flush=True); time.sleep(30)"


def test_memory_of_processes_that_a_stage_starts_is_counted() -> None:
    """A training on several devices holds nothing in its parent."""
    with Meter() as alone:
        time.sleep(0.2)
    with (
        Meter() as meter,
        subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(1.5)
        busy = usage()
        child.kill()
    before, found = alone.cost()["ram_mib"], meter.cost()["ram_mib"]
    assert before is not None
    assert found is not None
    assert found - before > 280
    assert busy["ram_mib"] > 300


def test_gpu_memory_that_processes_tell_is_added_up_by_device() -> None:
    with Meter() as meter:
        for device, mib in (("cuda:0", 100.0), ("cuda:1", 50.0), ("cuda:0", 80.0), ("cpu", None)):
            tell_gpu(device, mib)
    assert meter.cost()["gpu_mib"] == pytest.approx(150, abs=1)
    with Meter() as meter:
        pass
    assert meter.cost()["gpu_mib"] in (None, 0.0)


def test_peaks_are_not_reset_before_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a device by its number until then, and most stages of a GPU machine begin
    before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reset: list[int] = []

    def refuse(device: int) -> None:
        assert torch.cuda.is_initialized(), "Invalid device argument 0: did you call init?"
        reset.append(device)

    monkeypatch.setattr(torch._C, "_cuda_resetPeakMemoryStats", refuse, raising=False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**20)
    reset_gpu()
    assert not reset
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", refuse)
    reset_gpu()
    assert reset == [0, 1]
    assert peak_gpu() == 2


def test_how_busy_processors_and_gpus_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of its own that works all the time, and one that has ended."""
    work = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
    monkeypatch.setattr(meters, "_gpu_percents", lambda: {0: 40.0, 1: 80.0})
    began = time.monotonic()
    with Meter() as meter, subprocess.Popen([sys.executable, "-c", work.format(30)]) as child:
        subprocess.run([sys.executable, "-c", work.format(1)], check=True)
        time.sleep(1.5)
        worked = sum(psutil.Process(child.pid).cpu_times()[:2]) / (time.monotonic() - began)
        cost = meter.cost()
        child.kill()
    assert 70 * worked < (cost["cpu_percent"] or 0) < 250  # what it gets beside other tests
    assert cost["gpu_percent"] is None  # there is none here
    monkeypatch.setattr(meters, "peak_gpu", lambda: 1.0)
    with Meter() as meter:
        time.sleep(1.2)
    cost = meter.cost()
    assert cost["gpu_percent"] == 60
    assert (cost["cpu_percent"] or 0) < 50
