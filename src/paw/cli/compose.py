"""A command line, checked before anything heavy is imported: every mistake is one line with the
nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from paw.cli import explain, help
from paw.cli.schema import config_of, register, root, stages, tasks_with
from paw.config.checks import one_of
from paw.config.common import RunConfig
from paw.errors import ConfigError, nearest
from paw.paths import conf_dir
from paw.plugins import choices
from paw.text import first_line

DEMO = "experiment=demo"


def groups() -> dict[str, list[str]]:
    """Every group a user can choose from, with its choices."""
    found = help.groups()
    models = found.pop("model")
    return {**found, "model@source": models, "model@target": models}


def with_demo(overrides: Sequence[str]) -> list[str]:
    """A command line that names no model and no experiment runs on the embedded pair, with the
    demo's settings."""
    keys = r"model@(source|target)|models|experiment|(source|target)\.(path|hub)"
    named = re.compile(rf"^[+~]*({keys})\b")
    return list(overrides) if any(named.match(o) for o in overrides) else [DEMO, *overrides]


def typed(config: DictConfig) -> RunConfig:
    """The composed configuration as the Config of its task, every interpolation resolved.

    Raises:
        ConfigError: for an unknown key that `+` slipped past the schema, an impossible value, or
            values that do not go together.
    """
    try:
        _refuse_unknown_and_missing(config)
        OmegaConf.resolve(config)
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as e:
        raise explain.of(e) from None
    one_of("task", result.task, tuple(sorted(choices("task"))))
    for stage in result.force:
        one_of("force", stage, (*stages(), "all"))
    kind = config_of(result.task)
    _refuse_unread(result, kind)
    return kind(**{f.name: getattr(result, f.name) for f in fields(kind)})


def check(
    overrides: Sequence[str], sweep: bool = False, config_dir: str | None = None
) -> list[RunConfig]:
    """Composes what Hydra is about to compose, and raises ConfigError with one line if it cannot.

    Returns:
        The configuration; of a sweep its first, or where a plan is asked those of all jobs.
    """
    register()
    parsed = _parsed(overrides)
    several = next((o.input_line for o in parsed if o.is_sweep_override()), None)
    sweep = sweep or (several is not None and _always_sweeps(parsed, config_dir))
    if sweep and any(o.key_or_group == "plan" for o in parsed):
        return list(jobs(overrides, config_dir))
    first = _check_one(parsed, config_dir)
    if several and not sweep:
        raise ConfigError(
            f"{several}: several values are a sweep: add -m, or write a list as [a,b]."
        )
    return [first]


def jobs(overrides: Sequence[str], config_dir: str | None = None) -> Iterator[RunConfig]:
    """The configuration of every job of a sweep, by Hydra's basic sweeper."""
    register()
    batches = BasicSweeper.split_arguments(_parsed(overrides), None)
    yield from configs([list(job) for batch in batches for job in batch], config_dir)


def configs(jobs: Iterable[Sequence[str]], config_dir: str | None = None) -> Iterator[RunConfig]:
    """A configuration for each list of overrides. What they have in common is composed once: Hydra
    takes a tenth of a second for it, and a sweep may have hundreds."""
    register()
    known: dict[tuple[str, ...], DictConfig] = {}
    for job in jobs:
        parsed = _parsed(job)
        values = [o for o in parsed if _is_value(o)]
        chosen = tuple(o.input_line or "" for o in parsed if not _is_value(o))
        if chosen not in known:
            known[chosen] = _composed(chosen, config_dir)
        config = deepcopy(known[chosen])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException as e:
            raise explain.of(e) from None
        yield typed(config)


def _is_value(override: Override) -> bool:
    """Whether an override sets a key, and does not choose from a group."""
    line = override.input_line or ""
    return "." in override.key_or_group and not line.startswith(("+", "~", "hydra."))


def compose_config(overrides: Sequence[str]) -> Any:
    """The Config of a task, as a command line with these overrides would give it."""
    register()
    return _check_one(_parsed(with_demo(overrides)))


def composed(*overrides: str) -> Any:
    """The same for notebooks: compose("experiment=demo", "train.lr=1e-4")."""
    return compose_config(overrides)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser, out = OverridesParser.create(), []
    for text in overrides:
        try:
            out.append(parser.parse_override(text))
        except OverrideParseException:
            raise ConfigError(
                f"{text!r} is not of the form key=value (or group=choice). "
                "Quote values with blanks, commas or braces."
            ) from None
        except HydraException as e:
            raise ConfigError(f"{text!r}: {first_line(e)}") from None
    return out


def _check_one(overrides: Sequence[Override], config_dir: str | None = None) -> RunConfig:
    """A sweep is checked choice by choice, the others held at their first: their sum, not their
    product."""
    texts = [found for found in map(_choices, overrides) if found]
    first = [t[0] for t in texts]
    variants = [[*first[:i], c, *first[i + 1 :]] for i, t in enumerate(texts) for c in t[1:]]
    result = _compose(first, config_dir)
    for variant in variants:
        _compose(variant, config_dir)
    return result


def _always_sweeps(overrides: Sequence[Override], config_dir: str | None) -> bool:
    """Whether Hydra runs all jobs as a sweep, single ones too: as a hardware profile that
    dispatches them says."""
    lines = [o.input_line or "" for o in overrides]
    chosen = [line.partition("=")[2] for line in lines if line.startswith("hardware=")]
    known = choices("hardware")
    if config_dir:
        known |= {file.stem: file for file in Path(config_dir).glob("hardware/*.yaml")}
    profiles = [yaml.safe_load(known[name].read_text()) for name in chosen if name in known]
    modes = [(profile.get("hydra") or {}).get("mode") for profile in profiles]
    return "MULTIRUN" in modes or "hydra.mode=MULTIRUN" in lines


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException:  # glob(...) and the like are for Hydra to expand
        return []


def _compose(overrides: Sequence[str], config_dir: str | None) -> RunConfig:
    return typed(_composed(overrides, config_dir))


def _composed(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    known = groups()
    for text in overrides:
        _check_group(text, known)
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir: {config_dir} is no folder.")
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return compose("config", [*overrides, *search])
        except MissingConfigException as e:
            raise explain.missing(e, overrides) from None
        except (HydraException, OmegaConfBaseException) as e:
            raise explain.of(e) from None
        except AssertionError:  # Hydra's, of a key below one that is null
            raise explain.null(overrides) from None


def _check_group(text: str, known: Mapping[str, list[str]]) -> None:
    """`group=choice` with a choice that does not exist, or a group that does not."""
    key, _, value = text.lstrip("+~").partition("=")
    keys = {f.name for f in fields(root())}
    if key == "model":
        raise ConfigError(
            f"{text}: say which of the two models: model@source={value} or model@target={value}."
        )
    if key in known and key != "experiment" and value in ("null", "") and "=" in text:
        raise ConfigError(f"{text}: a {key} must be chosen." + nearest(value, known[key]))
    if key in known or key.startswith("hydra") or "/" in key:
        return
    if "@" in key or ("." not in key and key not in keys):
        near = nearest(key, [*known, *keys], limit=0)
        raise ConfigError(f"{key}: no such group or key." + near)


# ---- what gets past Hydra -------------------------------------------------------------------


def _walk(config: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig, Any]]:
    for key in config:
        yield f"{path}{key!s}", config, key
        if not OmegaConf.is_missing(config, key) and isinstance(config._get_node(key), DictConfig):
            node = config._get_node(key)
            assert isinstance(node, DictConfig)
            if not node._is_none() and not node._is_interpolation():
                yield from _walk(node, f"{path}{key!s}.")


def _refuse_unknown_and_missing(config: DictConfig) -> None:
    """`+source.nmae=x` gets past the schema, which is what `+` is for; refuse it all the same."""
    known: dict[Any, set[str]] = {}
    for path, parent, key in _walk(config):
        kind = OmegaConf.get_type(parent)
        if kind not in known:
            known[kind] = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
        if known[kind] and key not in known[kind]:
            raise ConfigError(f"{path}: no such key." + nearest(str(key), known[kind], limit=12))
        if OmegaConf.is_missing(parent, key):
            raise ConfigError(f"{path}: a value is missing. Set it with {path}=VALUE.")


def _refuse_unread(result: Any, kind: type[RunConfig]) -> None:
    """Groups are chosen for many tasks at once, by an experiment; a single key is set for one."""
    reads, grouped = {f.name for f in fields(kind)}, {*help.groups(), "source", "target"}
    for f in fields(result):
        if f.name in reads or f.name in grouped or getattr(result, f.name) == _default(f):
            continue
        takes = ", ".join(f"task={task}" for task in tasks_with(f.name))
        raise ConfigError(f"{f.name}: only {takes} takes it, not task={result.task}.")


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()
