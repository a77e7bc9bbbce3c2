"""Experiment trackers: SwanLab, W&B, TensorBoard, a CSV file, any of them at once. None may ask a
question or stop a run."""

from __future__ import annotations

import csv
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from paw.config.trackers import (
    CsvConfig,
    SwanLabConfig,
    TensorBoardConfig,
    TrackerConfig,
    WandbConfig,
)
from paw.errors import ConfigError
from paw.text import first_line

log = logging.getLogger("paw")


@dataclass(frozen=True)
class Left:
    """What a run leaves: a tracker shows as much of it as it can."""

    summary: str  # Markdown
    figures: Mapping[str, Path]  # PNG files by their titles
    page: Path | None  # report.html


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def keep(self, left: Left) -> None: ...
    def finish(self) -> None: ...


def open_trackers(config: TrackerConfig, run_dir: Path, settings: dict[str, Any]) -> Tracker | None:
    """All the trackers of a run as one, or None. One that cannot start is reported once, and the
    run goes on without it.

    Raises:
        ConfigError: if a package is not installed.
    """
    starts: list[tuple[str, Any, Callable[[Any, Path, dict[str, Any]], Tracker]]] = [
        ("swanlab", config.swanlab, _SwanLab),
        ("wandb", config.wandb, _Wandb),
        ("tensorboard", config.tensorboard, _TensorBoard),
        ("csv", config.csv, _Csv),
    ]
    chosen = [one for one in starts if one[1] is not None]
    for name, _, _ in chosen:  # before any of them has begun
        if find_spec(name) is None:
            raise ConfigError(
                f"tracker={name}: the package {name} is not installed. Install it: "
                f"pip install {name}"
            )
    opened: list[Tracker] = []
    for name, asked, start in chosen:
        try:
            opened.append(_Guarded(name, start(asked, run_dir, settings)))
        except Exception as e:
            _without(name, "could not start", e)
    return _All(opened) if opened else None


class _All:
    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)

    def keep(self, left: Left) -> None:
        for tracker in self._trackers:
            tracker.keep(left)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


class _Guarded:
    """A tracker whose first failure is reported and whose later ones are not: metrics are also in
    the artifacts."""

    def __init__(self, name: str, inner: Tracker) -> None:
        self._name, self._inner = name, inner
        self._failed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda t: t.log(values, step))

    def keep(self, left: Left) -> None:
        self._try(lambda t: t.keep(left))

    def finish(self) -> None:
        """What was told until a failure is kept, too."""
        self._guard(lambda t: t.finish())

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if not self._failed:
            self._guard(act)

    def _guard(self, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._inner)
        except Exception as e:
            if not self._failed:
                _without(self._name, "failed", e)
            self._failed = True


def _without(name: str, what: str, error: Exception) -> None:
    why = first_line(error)[:200]
    log.warning("      tracker %s %s (%s); the run goes on without it", name, what, why)


class _SwanLab:
    def __init__(self, config: SwanLabConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        with _unset("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT", "SWANLAB_WORKSPACE"):
            self._start(config, run_dir, settings)

    def _start(self, config: SwanLabConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import swanlab

        mode = config.mode
        if mode == "auto":  # its own default would ask for a key
            keys = Path.home() / ".swanlab" / ".netrc"
            known = os.environ.get("SWANLAB_API_KEY") or keys.is_file()
            mode = "online" if known else "offline"
        ask: dict[str, Any] = {
            "project": config.project,
            "workspace": config.workspace,
            "name": config.experiment or run_dir.name,
            "config": settings,
            "log_dir": config.dir or str(run_dir / "swanlog"),
            "reinit": True,
        }
        try:
            swanlab.init(mode=mode, **ask)
        except Exception as e:
            if mode != "online":
                raise
            log.warning(
                "      SwanLab cannot be reached (%s); offline instead, `swanlab sync` sends it "
                "later",
                first_line(e)[:200],
            )
            swanlab.init(mode="offline", **ask)
        self._swanlab = swanlab

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(values), step=step)

    def keep(self, left: Left) -> None:
        shown = {title: self._swanlab.Image(str(file)) for title, file in left.figures.items()}
        self._swanlab.log({"summary": self._swanlab.Text(left.summary), **shown}, step=0)

    def finish(self) -> None:
        self._swanlab.finish()


class _Wandb:
    def __init__(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb

        mode: Any = config.mode
        if mode == "auto":  # its own default would ask for a key
            netrc = Path.home() / ".netrc"
            signed_in = netrc.is_file() and "api.wandb.ai" in netrc.read_text()
            known = os.environ.get("WANDB_API_KEY") or signed_in
            mode = "online" if known else "offline"
        folder = Path(config.dir or run_dir / "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.experiment or run_dir.name,
            config=settings,
            dir=str(folder),
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        # W&B drops steps that go back, as those of a second training do: each metric's own step is
        # logged beside it
        self._run.log({**values, **{f"{key.split('/')[0]}/step": step for key in values}})

    def keep(self, left: Left) -> None:
        import wandb

        self._run.log({title: wandb.Image(str(file)) for title, file in left.figures.items()})
        report = wandb.Artifact(f"report-{self._run.id}", type="report")
        with report.new_file("summary.md", mode="w", encoding="utf-8") as f:
            f.write(left.summary)
        if left.page is not None:
            report.add_file(str(left.page))
        self._run.log_artifact(report)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, config: TensorBoardConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import tensorboard as _  # noqa: F401 - named in the error if it is missing
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(config.dir or str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]
        text = yaml.safe_dump(settings, sort_keys=False)
        self._writer.add_text("config", textwrap.indent(text, "    "))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def keep(self, left: Left) -> None:
        from matplotlib.image import imread

        self._writer.add_text("summary", left.summary)
        for title, file in left.figures.items():
            self._writer.add_image(title, imread(file), dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()


class _Csv:
    """metrics.csv: a line a value, as it comes."""

    def __init__(self, config: CsvConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        file = Path(config.file or run_dir / "metrics.csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        # a job that comes back goes on in its folder
        self._file = file.open("a", newline="", encoding="utf-8")
        self._lines = csv.writer(self._file)
        if not file.stat().st_size:
            self._lines.writerow(["time", "name", "step", "value"])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = f"{time.time():.3f}"
        self._lines.writerows([now, name, step, value] for name, value in values.items())
        self._file.flush()

    def keep(self, left: Left) -> None:
        pass  # it is of numbers; figures and report lie beside it

    def finish(self) -> None:
        self._file.close()


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Without some variables of the environment, which conf/tracker has read: SwanLab takes
    SWANLAB_PROJECT for the JSON of a section of its settings, and does not start with a name in it.
    """
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= held
