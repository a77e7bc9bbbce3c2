"""What Hydra and OmegaConf refuse, in one line with the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from paw.cli.schema import root
from paw.errors import ConfigError, nearest
from paw.text import first_line


def of(error: Exception) -> ConfigError:
    """An error of a key or a value."""
    cause = error
    while not isinstance(cause, OmegaConfBaseException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException):
        inner = cause.__cause__ or cause.__context__
        if isinstance(inner, ConfigError):
            return inner
        key = str(cause.full_key or cause.key or "")
        text = (cause.msg or str(cause)).splitlines()[0]
        if isinstance(cause, ConfigKeyError) or "not in struct" in text or "not in '" in text:
            return _no_key(key)
        if isinstance(cause, MissingMandatoryValue):
            return ConfigError(f"{key}: a value is missing. Set it with {key}=VALUE.")
        return ConfigError(f"{key}: {text}" if key and key not in text else text)
    if isinstance(error, ConfigCompositionException):
        match = re.search(r"Could not override '([^']+)'", str(error))
        if match:
            return _no_key(match[1])
    return ConfigError(first_line(error))


def missing(error: MissingConfigException, overrides: Sequence[str]) -> ConfigError:
    """A choice that a group does not have."""
    file = str(error.missing_cfg_file or "")
    group, _, choice = file.rpartition("/")
    if group in ("", "schema/transfer"):
        return ConfigError(first_line(error))
    written = (o for o in overrides if o.endswith(f"={choice}") and o.lstrip("+").startswith(group))
    asked = next(written, f"{group}={choice}")
    near = nearest(choice, error.options or [])
    return ConfigError(f"{asked}: no {group} called {choice!r}.{near}")


def null(overrides: Sequence[str]) -> ConfigError:
    """A tracker's key, where that tracker is not chosen."""
    asked = (o.lstrip("+").split("=")[0] for o in overrides if o.lstrip("+").startswith("tracker."))
    key = next((k for k in asked if k.count(".") == 2), "tracker")
    name = key.split(".")[1] if "." in key else "swanlab"
    several = f"'tracker=[{name},tensorboard]'"
    return ConfigError(f"{key}: needs tracker={name}, or several as {several}.")


def _no_key(key: str) -> ConfigError:
    parent, _, leaf = key.rpartition(".")
    return ConfigError(f"{key}: no such key." + nearest(leaf, _names_at(parent), limit=12))


def _names_at(parent: str) -> list[str]:
    """The keys of the schema under a dotted key, those of methods included."""
    nodes: list[Any] = [root()]
    for part in filter(None, parent.split(".")):
        hints = [get_type_hints(node).get(part) for node in nodes]
        inner = [kind for hint in hints for kind in (hint, *get_args(hint))]
        nodes = [schema for kind in inner for schema in _kinds(kind)]
    return list(dict.fromkeys(f.name for node in nodes for f in fields(node)))


def _kinds(annotation: Any) -> list[Any]:
    """A schema and those of its methods, which have keys of their own."""
    if not is_dataclass(annotation) or not isinstance(annotation, type):
        return []
    return [annotation, *(k for sub in annotation.__subclasses__() for k in _kinds(sub))]
