"""Base models, and adapters from elsewhere, as a graph has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paw.config.common import RunConfig, read_as
from paw.errors import ConfigError, nearest
from paw.graph import Check, Node, Source, Step, View
from paw.models.adapters import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    check_base,
    classes_of,
    find_adapter,
    made_for,
    other_base,
    read_config,
)
from paw.models.config import ModelConfig
from paw.models.load import is_encoder, room
from paw.models.locate import find_model, locate, on_hub
from paw.paths import register_embedded
from paw.plugins import choices
from paw.store import TOKENIZER, Input, Store, digest


@dataclass(frozen=True)
class Base:
    """A base model: as it is configured, and as a folder in the hub's layout."""

    config: ModelConfig
    node: Node

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def path(self) -> Path:
        """The folder of one from elsewhere.

        Raises:
            Absent: where it is not on this machine yet.
        """
        assert isinstance(self.node, Source)
        return self.node.path

    @property
    def made(self) -> Step[Any]:
        """The step that makes it, of a base that one does."""
        assert isinstance(self.node, Step)
        return self.node

    @property
    def tokenizer(self) -> View:
        """What is encoded for one model serves all that have its tokenizer, its room and its way of
        reading."""
        return View(self.node, "tokenizer", _tokenizer)


def base(c: RunConfig, model: ModelConfig) -> Base:
    """A configured model, fetched or dequantised when it is needed."""
    where = c.paths.models_dir
    source = Source(
        name=f"model {model.name}",
        described=["model", model.name, model.path, model.hub, model.revision],
        finder=lambda: find_model(model, where),
        getter=lambda watch: locate(model, where, watch),
        elsewhere=(lambda: on_hub(model)) if model.hub and not model.path else None,
    )
    return Base(model, source)


def given(path: str, base: Base) -> Source:
    """An adapter from elsewhere, for a base. One that is stamped for another base is refused; one
    that only says so by a name is warned of: nothing else would show that an adapter of Llama-3
    sits on Llama-3-Instruct."""

    def fits(store: Store) -> str:
        folder = find_adapter(path)
        read_config(folder)
        check_base(folder, store.file(base.path).fingerprint)
        return str(folder)

    def stranger(store: Store) -> str:
        folder, at = find_adapter(path), base.path
        known = [base.name, str(at), str(at.resolve()), *filter(None, [base.config.hub])]
        said = other_base(folder, known) if made_for(folder) is None else None
        if said is None:
            return ""
        return (
            f"{folder} says that it was trained on {said}, and is used on "
            f"{base.config.hub or at}. A base and its Instruct model have equal shapes, so nothing "
            "else shows it."
        )

    return Source(
        name=f"adapter {path}",
        described=["adapter", path, base.node.identity],
        finder=lambda: find_adapter(path),
        getter=lambda watch: find_adapter(path),
        checks=[
            Check(name=f"adapter {path}", look=fits),
            Check(name=f"base of {path}", look=stranger, warns=True),
        ],
    )


def attached(adapter: Node) -> View:
    """An adapter by what it does to a base: equal ones are evaluated once, however they were
    made."""
    return View(adapter, "adapter", _attached)


def inside(folder: Node, name: str) -> View:
    """The adapter of that name among those in a folder that one step made."""
    return View(
        folder, f"adapter {name}", lambda store, path: _attached_in(store, path, path / name)
    )


def model_named(name: str) -> ModelConfig:
    """A model by its name in conf/model, by a path, or by a hub id with a slash."""
    known = choices("model")
    if name in known:
        register_embedded()
        return read_as(ModelConfig, yaml.safe_load(known[name].read_text()))
    path = Path(name).expanduser()
    if path.exists():
        return ModelConfig(name=path.resolve().name.removesuffix(".gguf"), path=str(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ModelConfig(name=name.split("/")[1], hub=name)
    raise ConfigError(
        f"models: {name!r} is neither a model in conf/model, a path, nor a hub id."
        + nearest(name, known)
    )


def _tokenizer(store: Store, folder: Path) -> Input:
    files = {f: store.content(folder / f) for f in TOKENIZER if (folder / f).is_file()}
    return Input(folder, digest([files, room(folder), is_encoder(folder)]))


def _attached(store: Store, folder: Path) -> Input:
    return _attached_in(store, folder, folder)


def _attached_in(store: Store, whole: Path, folder: Path) -> Input:
    store.file(whole)  # refuses one that is damaged
    files = {f: folder / f for f in (CONFIG, WEIGHTS, PICKLED) if (folder / f).is_file()}
    held = {name: store.content(file) for name, file in files.items()}
    return Input(folder, digest([held, made_for(folder), classes_of(folder)]))
