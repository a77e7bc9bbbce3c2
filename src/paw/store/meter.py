"""What a stage cost: seconds, and the peaks of resident and GPU memory while it ran."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

import psutil

INTERVAL = 0.05


class Meter:
    """`with Meter() as m: …; m.cost()`. Resident memory of this process is sampled; GPU memory is torch's own peak."""

    def __enter__(self) -> Meter:
        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._began = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def cost(self) -> dict[str, float | None]:
        """Seconds, and peaks in MiB; GPU memory is None where there is no GPU."""
        torch = sys.modules.get("torch")
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch is not None and torch.cuda.is_available() else None
        peak = max(self._peak, self._process.memory_info().rss) / 2**20
        return {"seconds": round(time.perf_counter() - self._began, 3), "ram_mib": round(peak, 1),
                "gpu_mib": None if gpu is None else round(gpu, 1)}  # fmt: skip
