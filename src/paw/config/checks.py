"""What every schema checks its values with: one line that names the key, the value and what is
allowed."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from paw.errors import ConfigError


def transient(default: Any) -> Any:
    """A field that changes how fast or where a stage runs, not what it makes: it is left out of
    fingerprints."""
    return field(default=default, metadata={"transient": True})


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}: {value!r} is not allowed. Choose from: {', '.join(allowed)}.")


def within(key: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not (low <= value <= high) or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{key}: {value} is outside {bracket}{low:g}, {high:g}].")
