"""Where methods, kinds of data, tasks and stages are found: in paw, and in packages that have the
same folders.

A package `flips` with `flips/transfer/methods/flip.py` and `flips/conf/transfer/flip.yaml` adds
transfer=flip. It is found by an entry point of the group `paw.plugins` (its value is the package's
name), or as a folder that `$PAW_PLUGINS` names.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from paw.errors import ConfigError, nearest
from paw.paths import PACKAGE, conf_dir

GROUP, VARIABLE = "paw.plugins", "PAW_PLUGINS"


def packages() -> dict[str, Path]:
    """Import name and folder of paw and of every plugin.

    Raises:
        ConfigError: for one that is not there.
    """
    return _packages(os.environ.get(VARIABLE, ""))


@cache
def _packages(folders: str) -> dict[str, Path]:
    found = {"paw": PACKAGE}
    for text in filter(None, folders.split(os.pathsep)):
        folder = Path(text).expanduser().resolve()
        if not (folder / "__init__.py").is_file():
            raise ConfigError(f"${VARIABLE}: {folder} is no package: it has no __init__.py.")
        if str(folder.parent) not in sys.path:
            sys.path.append(str(folder.parent))
        found[folder.name] = folder
    for entry in entry_points(group=GROUP):
        spec = find_spec(entry.value)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"plugin {entry.name}: there is no package {entry.value}. Install it again."
            )
        found.setdefault(entry.value, Path(spec.submodule_search_locations[0]))
    return found


def modules(part: str) -> dict[str, str]:
    """The files of a folder such as data/kinds, by name: their import names. A plugin's file goes
    before paw's of the same name."""
    found = {}
    for package, folder in packages().items():
        for file in sorted((folder / part).glob("*.py")):
            if file.stem != "__init__":
                found[file.stem] = f"{package}.{part.replace('/', '.')}.{file.stem}"
    return found


def load(part: str, name: str, key: str) -> ModuleType:
    """The module of a name in a folder such as transfer/methods.

    Args:
        key: the configuration's, for the message.

    Raises:
        ConfigError: where there is none.
    """
    known = modules(part)
    if name not in known:
        raise ConfigError(f"{key}: there is no {name!r} in {part}." + nearest(name, known))
    return import_module(known[name])


def conf_dirs() -> list[Path]:
    """conf/ of paw, then of every plugin that has one."""
    plugins = [folder / "conf" for name, folder in packages().items() if name != "paw"]
    return [conf_dir(), *(folder for folder in plugins if folder.is_dir())]


def choices(group: str) -> dict[str, Path]:
    """The yaml files of a group, by name."""
    return {f.stem: f for folder in conf_dirs() for f in sorted((folder / group).glob("*.yaml"))}
