"""task=report: what a sweep found so far, or in the end: the best method of each pair; and a run's
page anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from paw.config.checks import within
from paw.config.common import RunConfig
from paw.console import Console
from paw.errors import ConfigError
from paw.sweeps.folder import JOBS

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

log = logging.getLogger("paw")


@dataclass
class Config(RunConfig):
    # the folder of a sweep, which the report is written into
    sweep: Optional[str] = None
    # or the folder of a run, whose report.html is written anew
    run: Optional[str] = None
    # read again until no job is queued or running, or Ctrl-C
    watch: bool = False
    every: float = 10.0  # seconds between two looks

    def __post_init__(self) -> None:
        super().__post_init__()
        within("every", self.every, 0, 86_400, open_low=True)


def run(config: Config, overrides: Sequence[str], run_dir: str | None = None) -> str:
    """Returns the page that was shown last.

    Raises:
        ConfigError: where no sweep is given, or a folder is none of a sweep.
    """
    from paw.sweeps.folder import read
    from paw.sweeps.report import report, states

    Console(config.verbosity)
    if config.run is not None:
        from paw.report.page import PAGE, write_page

        folder = Path(config.run).expanduser()
        write_page(folder, Path(config.paths.artifacts))
        page = str(folder / PAGE)
        log.info("%s", page)
        return page
    folder = _folder(config)
    page = report(folder)
    log.info("%s", page)
    try:
        while config.watch and {"queued", "running"} & set(states(read(folder))):
            time.sleep(config.every)
            now = report(folder)
            if now != page:
                log.info("\n%s\n\n%s", time.strftime("%H:%M:%S"), now)
            page = now
    except KeyboardInterrupt:
        pass  # it was only looked at: the sweep goes on
    return page


def _folder(config: Config) -> Path:
    if config.sweep is not None:
        return Path(config.sweep).expanduser()
    root = Path(config.paths.outputs) / "sweeps"
    found = [file.parent for file in root.glob(f"*/{JOBS}")]
    newest = max(found, key=lambda f: (f / JOBS).stat().st_mtime, default=None)
    there = f"The newest is sweep={newest}." if newest else f"There is none in {root}."
    raise ConfigError(f"sweep: task=report needs the folder of a sweep. {there}")
