"""The default of every field that is part of a stage's key, by stage and version.

    python tests/stage_defaults.py      writes stage_defaults.json anew

A key leaves out fields at their default, so that a new field keeps old results valid. A default
that is changed would give the new meaning the old key, and an artifact of the old one would be
reused: the stage's version must be raised with it.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from paw.cli.schema import register, stages
from paw.store import Stage

FILE = Path(__file__).with_suffix(".json")


def declared() -> list[Stage[Any]]:
    """Every stage, from the file of its name."""
    register()  # imports the methods, whose schemas are subclasses
    return [import_module(m).STAGE for m in stages().values() if m.startswith("paw.")]


def defaults(kind: Any, path: str) -> dict[str, Any]:
    """By dotted name; of a field that may hold several schemas (methods), of each of them."""
    out: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get("transient"):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        name = f"{path}.{field.name}"
        if default is not dataclasses.MISSING and not dataclasses.is_dataclass(default):
            out[name] = default
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                for schema in (inner, *subclasses(inner)):
                    out |= defaults(schema, f"{name}[{schema.__name__}]")
    return out


def subclasses(kind: type) -> list[type]:
    """Of paw: a test may have imported a plugin's."""
    own = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("paw.")]
    return [deeper for sub in own for deeper in (sub, *subclasses(sub))]


def now() -> dict[str, dict[str, Any]]:
    """As the code stands, by `stage version`."""
    found = {f"{s.name} {s.version}": defaults(s.config, s.name) for s in declared()}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


if __name__ == "__main__":
    FILE.write_text(json.dumps(now(), indent=1, sort_keys=True) + "\n")
