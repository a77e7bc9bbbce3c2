"""The folder of one launch: resolved config, log, results, adapters. Made when everything a run needs has been found."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import yaml

import paw
from paw.cli.schema import PawConfig
from paw.errors import PawError
from paw.report import records, results
from paw.report.results import System
from paw.store import MANIFEST, write_text
from paw.tasks.stages import Adapter, Stages
from paw.tracking import open_trackers

log = logging.getLogger("paw")


class Run:
    """`with Run(...) as run:`; whatever happens inside, what was evaluated until then is in the folder."""

    def __init__(
        self,
        config: PawConfig,
        overrides: list[str],
        run_dir: str | None,
        stages: Stages,
        label: str,
    ) -> None:
        self.config, self.console = config, stages.console
        self.folder = (
            Path(run_dir)
            if run_dir
            else new_folder(Path(config.paths.outputs) / "runs", config.name or label)
        )
        self._own = run_dir is None
        self._warnings = stages.warnings  # grows while the stages run
        self.systems: list[System] = []
        self.said: list[str] = []
        self._adapters: dict[str, Path] = {}
        self._links: list[str] = []
        settings = asdict(config)
        write_text(self.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self.console.keep(self.folder / "run.log")
        self.console.tracker = open_trackers(config.tracker, self.folder, settings)
        runtime, command = stages.runtime, shlex.join(["python", "-m", "paw.run", *overrides])
        self.about = {
            "title": f"{config.task}: {label}",
            "command": command,
            "dataset": f"{config.dataset.name}, split {stages.eval_split}",
            "device": f"{runtime.device}, {runtime.precision}",
            "seed": config.seed,
            "paw": paw.__version__,
        }
        log.info(
            "paw %s  %s  %s on %s  %s",
            paw.__version__,
            self.about["title"],
            self.about["dataset"],
            self.about["device"],
            self.folder,
        )
        self._began = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.console.close()
        if error is not None:
            self.console.note_failure(error)
            self.said.insert(0, f"Unfinished: {str(error) or type(error).__name__}")
        self.said = [*(f"Warning: {text}" for text in self._warnings), *self.said]
        if self.systems:
            form = self.config.evaluate.records
            results.write(
                self.folder,
                self.systems,
                self.said,
                self.about,
                records.file_names(self.systems, form),
            )
            records.publish(self.folder, self.systems, form)
        for name, path in self._adapters.items():
            _publish(path, self.folder / "adapters" / name)
        if error is None:
            self._close()
        if self.console.tracker is not None:
            self.console.tracker.finish()
        if (
            isinstance(error, PawError)
            and self._own
            and not self.systems
            and not self._adapters
            and not self._links
        ):
            shutil.rmtree(
                self.folder, ignore_errors=True
            )  # nothing was made: the one line that says why is all there is

    def add(self, system: System) -> System:
        self.systems.append(system)
        r = system.result
        self.console.start(system.name)
        self.console.metrics(
            {k: r[k] for k in ("accuracy", "loss", "perplexity") if r[k] is not None}, 0
        )
        return system

    def keep(self, name: str, adapter: Adapter) -> None:
        """The adapter will lie in the run folder under this name, as a plain PEFT folder."""
        self._adapters[name] = adapter.path

    def link(self, name: str, path: Path) -> None:
        """Something too large to be copied lies in the run folder as a link."""
        (self.folder / name).symlink_to(path.resolve(), target_is_directory=True)
        self._links.append(name)

    def _close(self) -> None:
        if self.systems:
            log.info("\n%s", results.table(self.systems))
        if self.said:
            log.info("\n%s", "\n".join(self.said))
        summary = self.folder / "summary.md" if self.systems else self.folder
        adapters = f", adapters: {self.folder / 'adapters'}" if self._adapters else ""
        adapters += "".join(f", {name}: {self.folder / name}" for name in self._links)
        log.info(
            "\n%.1f s in all. Results: %s%s", time.monotonic() - self._began, summary, adapters
        )


def new_folder(root: Path, label: str) -> Path:
    """<time>_<label>, with a number where another process had the same second."""
    root.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{label.replace('/', '_')[:100]}"
    for number in range(1, 1000):
        folder = root / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(str(root / name))


def _publish(adapter: Path, folder: Path) -> None:
    """Copies: what a user does to them must not change the artifact."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
