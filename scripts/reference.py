"""Every key of every group, from the dataclasses.

python scripts/reference.py > docs/configuration.md

A key's words are the comment beside or above its field; what it may be is what its class checks.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING as ASKED

from paw import plugins
from paw.cli.schema import config_of, root, tasks_with
from paw.config.common import RunConfig
from paw.text import markdown_table

HEAD = " ".join(
    (
        "# Configuration\n\nEvery key, made by `python scripts/reference.py` from the dataclasses",
        "that Hydra composes into. Set one on a command line as `KEY=VALUE` (`train.lr=3e-5`,",
        "`'force=[train]'`, `dataset.path=null`), or choose a group's file as `GROUP=CHOICE`:",
        "`--help` lists the choices, and `--cfg job --resolve` shows what a command line composes",
        "to. Defaults here are the classes' own; files in `conf/` set many of them. An",
        "interpolation such as `${hardware.train_batch_size}` may stand wherever a value may.\n",
    )
)
METHODS = {"adapter": "training/adapters", "transfer": "transfer/methods"}


@dataclass(frozen=True)
class Key:
    name: str
    kind: str
    default: str
    words: str

    @property
    def cells(self) -> list[str]:
        shown = (self.name, self.kind, self.default)
        return [*(f"`{text}`" if text else "" for text in shown), self.words]


def main() -> None:
    print(HEAD)
    config = root()
    hints, plain, groups = get_type_hints(config), [], {}
    for f in fields(config):
        kind = _inner(hints[f.name])
        if is_dataclass(kind):
            groups.setdefault(kind, []).append(f.name)
        else:
            plain.append(f)
    print("## Of every task, and of single ones\n")
    print(_table([_root_key(f, hints[f.name]) for f in plain]))
    for kind, names in groups.items():
        print(f"\n## {', '.join(names)}\n")
        if says := _says(kind):
            print(f"{says}\n")
        print(f"Read by: {_readers(names)}.\n")
        print(_table(list(_keys(kind, names[0]))))
        if names[0] in METHODS:
            _methods(names[0], METHODS[names[0]], kind)


def _methods(group: str, part: str, base: type[Any]) -> None:
    """Keys that single methods of a group have beside the group's own."""
    own = {f.name for f in fields(base)}
    for name, module in plugins.modules(part).items():
        method = getattr(import_module(module), "METHOD", None)
        if method is None:
            continue
        found = [k for k in _keys(method.schema, group) if k.name.split(".")[1] not in own]
        if found:
            print(f"\n### {group}={name}\n\n{_table(found)}")


def _readers(names: list[str]) -> str:
    if names[0] in {f.name for f in fields(RunConfig)}:
        return "all tasks"
    return ", ".join(f"`task={t}`" for t in tasks_with(names[0]))


def _root_key(f: Field[Any], hint: Any) -> Key:
    """Tasks may mean different things by a key: each says it."""
    tasks, said = tasks_with(f.name), dict[str, list[str]]()
    for task in tasks:
        config = config_of(task)
        parts = (_words(config).get(f.name), _limits(config).get(f.name))
        said.setdefault("; ".join(filter(None, parts)), []).append(task)
    every = len(tasks) > 3
    lines = [w if every else f"{w} ({', '.join(ts)})".strip() for w, ts in said.items()]
    return Key(f.name, _kind(hint), _default(f), "; ".join(filter(None, lines)))


def _keys(kind: type[Any], prefix: str) -> Iterator[Key]:
    hints, words, limits = get_type_hints(kind), _words(kind), _limits(kind)
    for f in fields(kind):
        if f.name.startswith("_"):
            continue
        key, inner = f"{prefix}.{f.name}", _inner(hints[f.name])
        if is_dataclass(inner):
            yield Key(key, "", "", words.get(f.name, "") or _says(inner))
            yield from _keys(inner, key)
            continue
        said = [words.get(f.name, ""), limits.get(f.name, "")]
        yield Key(key, _kind(hints[f.name]), _default(f), "; ".join(filter(None, said)))


def _table(keys: list[Key]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in key.cells] for key in keys]
    return markdown_table([["key", "type", "default", ""], *rows])


# ---- a class, read ---------------------------------------------------------------------------


def _says(kind: type[Any]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split())


@cache
def _words(kind: type[Any]) -> dict[str, str]:
    """Comments of the fields of a class and its bases."""
    out: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not is_dataclass(one) or one.__module__ == "builtins":
            continue
        try:
            lines = textwrap.dedent(inspect.getsource(one)).splitlines()
        except (OSError, TypeError):
            continue
        above: list[str] = []
        for line in lines:
            field = re.match(r"^    (\w+): [^#]*?(?:#\s*(.*))?$", line)
            if comment := re.match(r"^    # (.*)$", line):
                above.append(comment[1])
            elif field:
                said = " ".join([*above, field[2] or ""]).strip()
                out[field[1]] = re.sub(r"^[A-Z][^.]*\. (?=[a-z])", "", said)  # a heading of several
                above = []
            else:
                above = []
    return out


@cache
def _limits(kind: type[Any]) -> dict[str, str]:
    """What a field may be, from the calls of `one_of` and `within` in the class."""
    out: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        except (OSError, TypeError):
            continue
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = getattr(call.func, "id", "")
            if name not in ("one_of", "within") or not isinstance(call.args[0], ast.Constant):
                continue
            key, rest = str(call.args[0].value).split(".")[-1], call.args[2:]
            known = dict(vars(sys.modules[one.__module__]))
            try:
                values = [eval(ast.unparse(a), known) for a in rest]
            except NameError:  # a name of its function
                continue
            if name == "one_of":
                out[key] = ", ".join(f"`{v}`" for v in values[0])
            else:
                out[key] = f"{values[0]:g} to {values[1]:g}"
    return out


def _inner(hint: Any) -> Any:
    """The class of Optional[class]."""
    return next((a for a in get_args(hint) if is_dataclass(a)), hint)


def _kind(hint: Any) -> str:
    text = str(hint) if get_args(hint) else hint.__name__
    text = re.sub(r"typing\.|paw\.[\w.]*\.", "", text)
    text = re.sub(r"(?:Optional\[(.*)\])$|^(.*) \| None$", r"\1\2 or null", text)
    return text.replace("NoneType", "null")


def _default(f: Field[Any]) -> str:
    if f.default is ASKED or (f.default is MISSING and f.default_factory is MISSING):
        return ""
    made = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
    if is_dataclass(made):
        return ""
    return made.replace("\n", "\\n") if isinstance(made, str) else json.dumps(made)


if __name__ == "__main__":
    main()
