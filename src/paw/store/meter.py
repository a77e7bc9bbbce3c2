"""What a stage cost: seconds, the peaks of memory while it ran, and how busy it kept processors and
devices, over all its processes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from functools import lru_cache
from typing import Any

import psutil

INTERVAL = 0.05  # seconds between samples of resident memory
FAMILY = 1.0  # seconds between looks for processes that were started since

_told: dict[str, float] = {}  # peaks that other processes of the stage have told of, MiB by device


class Meter:
    """`with Meter() as m: …; m.cost()`. One at a time in a process.

    Resident memory of this process and of all that it has started is sampled and added up: pages
    that they share count once for each. GPU memory is torch's own peak, of all devices; other
    processes tell theirs (`tell_gpu`).
    """

    def __enter__(self) -> Meter:
        self._process = psutil.Process()
        self._family: list[psutil.Process] = []
        self._looked = 0.0
        self._busy: list[float] = []  # percent of each GPU, a sample a second
        self._peak = self._resident()
        self._worked = self._cpu_seconds()
        self._began = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        _told.clear()
        reset_gpu()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        asked = time.monotonic()  # of the GPUs: not of what was before
        while not self._done.wait(INTERVAL):
            self._peak = max(self._peak, self._resident())
            if time.monotonic() - asked >= FAMILY:
                asked = time.monotonic()
                self._busy += _gpu_percents().values()

    def _resident(self) -> int:
        now = time.monotonic()
        if now - self._looked >= FAMILY:
            self._looked = now
            with contextlib.suppress(psutil.Error):
                self._family = self._process.children(recursive=True)
        total = int(self._process.memory_info().rss)
        for process in self._family:
            with contextlib.suppress(psutil.Error):  # it has ended since
                total += process.memory_info().rss
        return total

    def _cpu_seconds(self) -> float:
        """Of this process, of all that it has started and waited for, and of those that run."""
        total = sum(self._process.cpu_times()[:4])
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
        return total

    def cost(self) -> dict[str, float | None]:
        """Seconds; peaks in MiB; processors in percent of one, and GPUs in percent of all, in the
        mean. What is a GPU's is None where there is none."""
        own = peak_gpu()
        gpu = None if own is None and not _told else (own or 0.0) + sum(_told.values())
        peak = max(self._peak, self._resident()) / 2**20
        seconds = time.perf_counter() - self._began
        busy = sum(self._busy) / len(self._busy) if self._busy and gpu is not None else None
        return {
            "seconds": round(seconds, 3),
            "ram_mib": round(peak, 1),
            "gpu_mib": None if gpu is None else round(gpu, 1),
            "cpu_percent": round(100 * (self._cpu_seconds() - self._worked) / max(seconds, 1e-3)),
            "gpu_percent": None if busy is None else round(busy),
        }


def tell_gpu(device: str, mib: float | None) -> None:
    """Notes what another process of the stage used of a device at most; None where it is no GPU."""
    if mib is not None:
        _told[device] = max(_told.get(device, 0.0), mib)


def peak_gpu() -> float | None:
    """torch's peak in this process, MiB, all devices added up; None where there is no GPU."""
    cuda = _cuda()
    if cuda is None:
        return None
    peaks = (float(cuda.max_memory_allocated(device)) for device in range(cuda.device_count()))
    return sum(peaks) / 2**20


def reset_gpu() -> None:
    """Counts peaks anew. Before CUDA is used for the first time there are none; asking raises."""
    cuda = _cuda()
    if cuda is not None and cuda.is_initialized():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


# ---- while it runs --------------------------------------------------------------------------


def usage() -> dict[str, float]:
    """What this process and all that it has started use right now: percent of one core, resident
    MiB; and of every NVIDIA GPU that it may use the percent and the MiB in use."""
    family = [psutil.Process()]
    with contextlib.suppress(psutil.Error):
        family += family[0].children(recursive=True)
    found = {"cpu_percent": 0.0, "ram_mib": 0.0}
    for process in family:
        with contextlib.suppress(psutil.Error):
            known = _kept(process.pid)  # percent is since the last call of the same object
            found["cpu_percent"] += known.cpu_percent()
            found["ram_mib"] += known.memory_info().rss / 2**20
    for device, percent in _gpu_percents().items():
        import pynvml

        found[f"gpu{device}_percent"] = percent
        with contextlib.suppress(pynvml.NVMLError):
            used = pynvml.nvmlDeviceGetMemoryInfo(_gpus()[device]).used
            found[f"gpu{device}_mib"] = used / 2**20
    return {key: round(value, 1) for key, value in found.items()}


def _gpu_percents() -> dict[int, float]:
    """How busy each NVIDIA GPU is right now, of those that this process may use."""
    found = {}
    for device, handle in enumerate(_gpus()):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            found[device] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return found


@lru_cache(maxsize=256)
def _kept(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def _handle(name: str) -> Any:
    """Of a GPU by its number, or by its UUID."""
    import pynvml

    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


@lru_cache
def _gpus() -> list[Any]:
    """NVML's handles of the GPUs that this process may use; none where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(pynvml.nvmlDeviceGetCount())) if seen is None else seen.split(",")
        return [_handle(name.strip()) for name in names if name.strip()]
    except Exception:  # no library, driver or permission: nothing to show, no reason to stop
        return []
