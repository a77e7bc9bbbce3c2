"""What a stage used, counted over all the processes that it started."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from paw.store.meter import Meter, tell_gpu, usage

HOLD = "import time; held = bytearray(300 * 2**20); print('held', flush=True); time.sleep(30)"


def test_memory_of_processes_that_a_stage_starts_is_counted() -> None:
    """A training on several devices holds nothing in its parent."""
    with Meter() as alone:
        time.sleep(0.2)
    with Meter() as meter, subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as child:
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
