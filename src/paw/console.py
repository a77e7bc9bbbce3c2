"""What a person sees: a line per step, one live bar on a terminal, a plain line now and then
elsewhere, and a log file."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO

from tqdm import tqdm

from paw.evaluation.result import EvaluateResult
from paw.graph import Step
from paw.store import Artifact, Holder, usage
from paw.tracking import Tracker

EVERY = 30.0  # seconds between plain lines of progress
USAGE = 5.0  # seconds between looks at what the machine is used for, for trackers

STEP = 15  # the level of what steps tell of themselves: less than results and warnings

log = logging.getLogger("paw")


class Console:
    """What steps tell of themselves: on the screen, in the log file, to the trackers.

    A quiet one shows results and warnings; a verbose one what libraries warn of and tracebacks,
    too. The log file has everything.
    """

    def __init__(self, verbosity: str = "normal", stream: TextIO | None = None) -> None:
        self.tracker: Tracker | None = None
        self.verbosity, self.label = verbosity, ""
        self.live = sys.stderr.isatty() and verbosity != "quiet"
        self._bar: Any = None
        self._last = self._began = time.monotonic()
        self._used = float("-inf")  # when the machine was looked at
        log.setLevel(STEP)
        log.propagate = False
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        self._shown = logging.StreamHandler(stream or sys.stdout)
        self._shown.setLevel(logging.INFO if verbosity == "quiet" else STEP)
        self._shown.setFormatter(_Painted(self._shown.stream))
        log.addHandler(self._shown)

    def __reduce__(self) -> tuple[type[Console], tuple[str]]:
        # a process of a training speaks for itself; tracker and log file stay with its parent
        return Console, (self.verbosity,)

    def keep(self, file: Path) -> None:
        """Everything said from now on is also in a file, with times; libraries' warnings only
        there."""
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        logging.captureWarnings(True)
        warned = logging.getLogger("py.warnings")
        verbose = [self._shown] if self.verbosity == "verbose" else []
        warned.handlers, warned.propagate = [handler, *verbose], False

    def note_failure(self, error: BaseException) -> None:
        """With its traceback into the log file, and on the screen of a verbose one: whoever catches
        it tells the user in one line."""
        where = (type(error), error, error.__traceback__)
        record = log.makeRecord("paw", logging.ERROR, "", 0, "stopped: %s", (error,), where)
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler) or self.verbosity == "verbose":
                handler.handle(record)

    def start(self, label: str) -> None:
        """A new piece of work, whose metrics carry its label."""
        self.close()
        self.label, self._began = label, time.monotonic()
        self._last = self._began

    def finished(self, step: Step[Any], made: Artifact[Any], number: int, of: int) -> None:
        self.close()
        seconds = f"{made.cost['seconds'] or 0:.1f} s" + " when it ran" * made.reused
        state = "reused" if made.reused else "computed"
        if isinstance(made.result, EvaluateResult):
            figures = {key: getattr(made.result, key) for key in ("accuracy", "loss", "perplexity")}
            self.label = step.name
            self.metrics({key: x for key, x in figures.items() if x is not None}, 0)
        count = f"[{number:{len(str(of))}}/{of}]"
        log.log(STEP, "%s %-8s  %s: %s  (%s)", count, state, step.name, made.result, seconds)

    def failed(self, step: Step[Any], error: Exception) -> None:
        """Said at once, with the traceback in the log file: others may run for hours yet."""
        self.close()
        log.error("      failed    %s: %s", step.name, error or type(error).__name__)
        self.note_failure(error)

    def waiting(self, step: Step[Any], holder: Holder) -> None:
        self.close()
        log.log(STEP, "      waiting   %s: %s makes it", step.name, holder)

    def say(self, text: str) -> None:
        self._clear()
        log.log(STEP, "      %s", text)

    def warn(self, text: str) -> None:
        self._clear()
        log.warning("      Warning: %s", text)

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self.live:
            if self._bar is None or self._bar.total != total:
                self.close()
                width, height = shutil.get_terminal_size()
                shape: Any = {"ncols": width, "nrows": height, "bar_format": _BAR}
                self._bar = tqdm(total=total, leave=False, file=sys.stderr, **shape)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= EVERY and done < total:
            left = (now - self._began) / max(done, 1) * (total - done)
            share, more = f"{100 * done // total} %", f" ({note})" if note else ""
            self.say(f"{self.label}: {done} of {total}, {share}, about {left:.0f} s left{more}")
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


class _Painted(logging.Formatter):
    """The state of a step in colour, where that shows: on a terminal, unless NO_COLOR says no."""

    COLOURS: ClassVar = {"computed": 32, "reused": 2, "waiting": 33, "failed": 31, "Warning": 33}
    STATE = re.compile(rf"^(\[[ \d]+/\d+\] +|      )({'|'.join(COLOURS)})")

    def __init__(self, stream: TextIO) -> None:
        super().__init__("%(message)s")
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.painted = stream.isatty() and not plain

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return self.STATE.sub(self._paint, text) if self.painted else text

    def _paint(self, found: re.Match[str]) -> str:
        return f"{found[1]}\033[{self.COLOURS[found[2]]}m{found[2]}\033[0m"


_BAR = (
    "      {percentage:3.0f} % {bar:30} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"
    "{postfix}"
)
