"""Experiment trackers: none, SwanLab, TensorBoard. None may ask a question or stop a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from paw.config.schema import TrackerConfig
from paw.errors import ConfigError

log = logging.getLogger("paw")


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


def open_tracker(config: TrackerConfig, run_dir: Path, settings: dict[str, Any]) -> Tracker | None:
    """The tracker of a run, or None. One that cannot start is reported once, and the run goes on without it.

    Raises:
        ConfigError: if its package is not installed.
    """
    if config.name == "none":
        return None
    starts: dict[str, Callable[[TrackerConfig, Path, dict[str, Any]], Tracker]] = {"swanlab": _SwanLab, "tensorboard": _TensorBoard}
    try:
        return _Guarded(starts[config.name](config, run_dir, settings))
    except ImportError as e:
        raise ConfigError(f"tracker={config.name}: the package {e.name} is not installed. Install it: pip install {e.name}") from None
    except Exception as e:
        log.warning("      tracker %s could not start (%s); the run goes on without it", config.name, _line(e))
        return None


class _Guarded:
    """A tracker whose first failure is reported and whose later ones are not: metrics are also in the artifacts."""

    def __init__(self, inner: Tracker) -> None:
        self._inner: Tracker | None = inner

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda t: t.log(values, step))

    def finish(self) -> None:
        self._try(lambda t: t.finish())

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if self._inner is None:
            return
        try:
            act(self._inner)
        except Exception as e:
            log.warning("      the tracker failed (%s); the run goes on without it", _line(e))
            self._inner = None


class _SwanLab:
    def __init__(self, config: TrackerConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import swanlab

        mode = config.mode
        if mode == "auto":  # its own default would ask for a key
            known = os.environ.get("SWANLAB_API_KEY") or (Path.home() / ".swanlab" / ".netrc").is_file()
            mode = "online" if known else "offline"
        ask: dict[str, Any] = {"project": config.project, "name": run_dir.name, "config": settings,
                               "log_dir": config.dir or str(run_dir / "swanlog"), "reinit": True}  # fmt: skip
        try:
            swanlab.init(mode=mode, **ask)
        except Exception as e:
            if mode != "online":
                raise
            log.warning("      SwanLab cannot be reached (%s); offline instead, `swanlab sync` sends it later", _line(e))
            swanlab.init(mode="offline", **ask)
        self._swanlab = swanlab

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(values), step=step)

    def finish(self) -> None:
        self._swanlab.finish()


class _TensorBoard:
    def __init__(self, config: TrackerConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import tensorboard as _  # noqa: F401 - named in the error if it is missing
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(config.dir or str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
