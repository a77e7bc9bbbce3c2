"""What a person sees: a banner a stage, one live bar on a terminal, a plain line now and then elsewhere, and a log file."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from paw.store import usage
from paw.tracking import Tracker

EVERY = 30.0  # seconds between plain lines of progress
USAGE = 5.0  # seconds between looks at what the machine is used for, for trackers

log = logging.getLogger("paw")


class Console:
    """The Watch of every stage: shows progress, keeps the log, passes metrics on to the tracker."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.tracker: Tracker | None = None
        self.label = ""
        self.live = sys.stderr.isatty()
        self._bar: Any = None
        self._last = self._began = time.monotonic()
        self._used = float("-inf")  # when the machine was looked at
        log.setLevel(logging.INFO)
        log.propagate = False
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        shown = logging.StreamHandler(stream or sys.stdout)
        shown.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(shown)

    def __reduce__(self) -> tuple[type[Console], tuple[()]]:
        return (
            Console,
            (),
        )  # a process of a training speaks for itself; tracker and log file stay with its parent

    def keep(self, file: Path) -> None:
        """From now on everything said is also in a file, with times; warnings of libraries only there."""
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        logging.captureWarnings(True)
        warned = logging.getLogger("py.warnings")
        warned.handlers, warned.propagate = [handler], False

    def note_failure(self, error: BaseException) -> None:
        """Into the log file only, with its traceback: whoever catches it tells the user in one line."""
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler):
                where = (type(error), error, error.__traceback__)
                handler.handle(
                    log.makeRecord("paw", logging.ERROR, "", 0, "stopped: %s", (error,), where)
                )

    def banner(self, text: str) -> None:
        self.close()
        log.info("\n%s", text)

    def start(self, label: str) -> None:
        """A new piece of work, whose metrics carry its label."""
        self.close()
        self.label, self._began = label, time.monotonic()
        self._last = self._began

    def say(self, text: str) -> None:
        self._clear()
        log.info("      %s", text)

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self.live:
            if self._bar is None or self._bar.total != total:
                self.close()
                columns, lines = shutil.get_terminal_size()
                self._bar = tqdm(
                    total=total,
                    leave=False,
                    file=sys.stderr,
                    ncols=columns,
                    nrows=lines,
                    bar_format=_BAR,
                )
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= EVERY and done < total:
            left = (now - self._began) / max(done, 1) * (total - done)
            log.info(
                "      %s: %d of %d, %d %%, about %.0f s left%s",
                self.label,
                done,
                total,
                100 * done // total,
                left,
                f" ({note})" if note else "",
            )
            self._last = now

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if self.tracker is None:
            return
        now, used = time.monotonic(), {}
        if now - self._used >= USAGE:
            self._used, used = now, {f"system/{k}": v for k, v in usage().items()}
        self.tracker.log({f"{self.label}/{k}": v for k, v in values.items()} | used, step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()


_BAR = "      {percentage:3.0f} % {bar:30} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
