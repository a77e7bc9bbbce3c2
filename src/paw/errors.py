"""What went wrong on the user's side: one line that says what, where and the remedy; exit code 2.

A traceback means a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class PawError(Exception):
    """Base of all errors a user can mend."""

    exit_code = 2


class ConfigError(PawError):
    """A wrong group, key, type or value."""


class ModelError(PawError):
    """A base model that cannot be found, read or used."""


class DataError(PawError):
    """A data set that cannot be found or read."""


class AdapterError(PawError):
    """An adapter that is broken or belongs to another base."""


class TransferError(PawError):
    """A transfer that cannot be done with these two models."""


class StageError(PawError):
    """A stage that cannot be run, or whose artifact cannot be read."""


def need(package: str, extra: str, what: str) -> None:
    """
    Raises:
        ConfigError: where a package that `what` needs is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f'{what} needs the package {package}. Install it: pip install "paw[{extra}]".'
        )


def nearest(name: str, names: Iterable[str], limit: int = 24) -> str:
    """`Did you mean …?` if a name is close, and the list of names if it is short."""
    known = sorted(set(names))
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    if known and (len(known) <= limit or not close):
        hint += f" Choose from: {', '.join(known)}."
    return hint
