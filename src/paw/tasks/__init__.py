"""What a user asks for: one file per task, each only wiring."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paw.cli.schema import PawConfig


def dispatch(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> object:
    """Runs `config.task`, the module of that name beside this file."""
    return import_module(f"paw.tasks.{config.task}").run(config, overrides, run_dir)
