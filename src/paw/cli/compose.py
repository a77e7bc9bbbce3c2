"""A command line, checked before anything heavy is imported: every mistake is one line with the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from paw.cli.schema import PawConfig, register
from paw.errors import ConfigError, nearest
from paw.models.config import ModelConfig
from paw.paths import conf_dir
from paw.transfer.config import TRANSFER_SCHEMAS, PlaceboConfig, TransferConfig

DEMO = "experiment=demo"


def groups() -> dict[str, list[str]]:
    """Every group a user can choose from, with its choices."""
    found: dict[str, list[str]] = {}
    for folder in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        choices = sorted(f.stem for f in folder.glob("*.yaml"))
        for group in ("model@source", "model@target") if folder.name == "model" else (folder.name,):
            found[group] = choices
    return found


def with_demo(overrides: Sequence[str]) -> list[str]:
    """A command line that names no model and no experiment runs on the embedded pair, with the demo's settings."""
    named = re.compile(
        r"^[+~]*(model@(source|target)|models|experiment|source\.(path|hub)|target\.(path|hub))\b"
    )
    return list(overrides) if any(named.match(o) for o in overrides) else [DEMO, *overrides]


def typed(config: DictConfig) -> PawConfig:
    """The composed configuration as checked dataclasses, every interpolation resolved.

    Raises:
        ConfigError: for an unknown key that `+` slipped past the schema, or an impossible value.
    """
    try:
        _refuse_unknown_keys(config)
        _refuse_missing(config)
        OmegaConf.resolve(config)
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as e:
        raise _explain(e) from None
    assert isinstance(result, PawConfig)
    for name in result.models:
        model_named(name)
    for name in result.transfer.controls:
        transfer_named(name, result.transfer)
    if result.models and result.task != "evaluate":
        raise ConfigError(
            f"models: only task=evaluate takes a list of models, not task={result.task}. Use model@source and model@target."
        )
    if result.adapter.path and result.task in ("evaluate", "train", "prefer"):
        raise ConfigError(
            f"adapter.path: task={result.task} does not take it. Score adapters with task=evaluate adapters=[DIR]."
        )
    if result.target_adapter.path and result.task != "pipeline":
        raise ConfigError(
            f"target_adapter.path: only task=pipeline compares with an adapter of the target, not task={result.task}."
        )
    if result.evaluate.mode == "letter" and result.dataset.kind in ("text", "chat"):
        raise ConfigError(
            f"evaluate.mode=letter: {result.dataset.name} has no choices to put under letters. Use likelihood or generate."
        )
    if result.evaluate.mode == "classify":
        if result.task in ("pipeline", "transfer"):
            raise ConfigError(
                f"task={result.task}: a trained head belongs to its own base and is not transferred. "
                "Use evaluate.mode=likelihood, where classes are words."
            )
        if result.dataset.kind in ("text", "chat") or result.evaluate.num_fewshot:
            raise ConfigError(
                "evaluate.mode=classify: needs a data set with labels (kind question or glue), and takes no shots."
            )
    factors = result.adapter.method == "lora" and not getattr(result.adapter, "dora", False)
    if result.task in ("pipeline", "transfer") and not result.adapter.path and not factors:
        raise ConfigError(
            f"task={result.task}: only LoRA is transferred (adapter=lora, rslora, qlora), not what this adapter trains. "
            "Train it with task=train."
        )
    if result.task == "prefer":
        _check_prefer(result)
    if result.train.gradient_checkpointing and result.adapter.method == "prefix_tuning":
        raise ConfigError(
            "train.gradient_checkpointing: prefix tuning keeps a cache, which recomputing cannot. Leave it out."
        )
    if result.runs and result.task != "compare":
        raise ConfigError(f"runs: only task=compare takes runs, not task={result.task}.")
    if result.adapters and result.task != "evaluate":
        raise ConfigError(
            f"adapters: only task=evaluate scores a list of adapters, not task={result.task}. "
            "Use adapter.path=DIR to transfer one."
        )
    return result


def _check_prefer(config: PawConfig) -> None:
    """TRL trains there, and not all that `train` offers is its."""
    t = config.train
    if config.adapter.method != "lora" or config.adapter.quantise != "none":
        raise ConfigError("task=prefer: trains LoRA on a base in full precision. Use adapter=lora.")
    for key, asked in (
        ("val_every", t.val_every),
        ("compile", t.compile),
        ("liger", t.liger),
        ("packing", t.packing),
    ):
        if asked:
            raise ConfigError(f"train.{key}: task=prefer does not take it. Leave it out.")
    if t.optimizer != "adamw" or t.resume != "auto":
        raise ConfigError(
            "task=prefer: takes train.optimizer=adamw, and does not resume. Leave train.optimizer and train.resume out."
        )
    if t.batch_size % (t.accumulate or 1):
        raise ConfigError(
            f"train.accumulate={t.accumulate}: must divide train.batch_size={t.batch_size} in task=prefer."
        )


def check(overrides: Sequence[str], sweep: bool = False, config_dir: str | None = None) -> None:
    """Composes what Hydra is about to compose, and raises ConfigError with one line if it cannot."""
    register()
    parsed = _parsed(overrides)
    several = next((o.input_line for o in parsed if o.is_sweep_override()), None)
    _check_one(parsed, config_dir)
    if several and not sweep and "hydra.mode=MULTIRUN" not in overrides:
        raise ConfigError(
            f"{several}: several values are a sweep: add -m, or write a list as [a,b]."
        )


def compose_config(overrides: Sequence[str]) -> PawConfig:
    """A typed configuration from overrides, as a command line would give it: for notebooks and tests."""
    register()
    return _check_one(_parsed(with_demo(overrides)))


def model_named(name: str) -> ModelConfig:
    """A model by its name in conf/model, by a path, or by a hub id with a slash."""
    file = conf_dir() / "model" / f"{name}.yaml"
    if file.is_file():
        raw = OmegaConf.merge(OmegaConf.structured(ModelConfig), yaml.safe_load(file.read_text()))
        found = OmegaConf.to_object(raw)
        assert isinstance(found, ModelConfig)
        return found
    path = Path(name).expanduser()
    if path.exists():
        return ModelConfig(name=path.resolve().name.removesuffix(".gguf"), path=str(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ModelConfig(name=name.split("/")[1], hub=name)
    raise ConfigError(
        f"models: {name!r} is neither a model in conf/model, a path, nor a hub id."
        + nearest(name, groups()["model@source"])
    )


def transfer_named(name: str, like: TransferConfig, seed: int = 0) -> TransferConfig:
    """Another method with its own defaults, and all that is shared taken from `like`: a control beside a method."""
    if name not in groups()["transfer"]:
        raise ConfigError(
            f"transfer.controls: no method {name!r}." + nearest(name, groups()["transfer"])
        )
    if name == like.method:
        return like
    own = TRANSFER_SCHEMAS.get(name, TransferConfig)
    shared = {
        f.name: getattr(like, f.name) for f in fields(TransferConfig) if f.name != "evidence"
    } | {"controls": []}
    chosen = yaml.safe_load((conf_dir() / "transfer" / f"{name}.yaml").read_text())
    values = shared | {
        k: v for k, v in chosen.items() if k != "defaults" and not str(v).startswith("${")
    }
    if own is PlaceboConfig:  # it is matched to the method it stands beside, and looks at the same
        values["reference"] = like.reference if isinstance(like, PlaceboConfig) else like.method
        values["evidence"] = like.evidence
    if "seed" in {f.name for f in fields(own)}:
        values["seed"] = seed
    return own(**values)


# ---- what can be wrong, in one line each ------------------------------------------------------------


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
            raise ConfigError(f"{text!r}: {_first_line(e)}") from None
    return out


def _check_one(overrides: Sequence[Override], config_dir: str | None = None) -> PawConfig:
    """Sweeps are checked choice by choice, the others held at their first: linear, not the product."""
    texts = [choices for choices in map(_choices, overrides) if choices]
    first = [t[0] for t in texts]
    variants = [first] + [
        [*first[:i], c, *first[i + 1 :]] for i, t in enumerate(texts) for c in t[1:]
    ]
    results = [_compose(v, config_dir) for v in variants]
    return results[0]


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException:  # glob(...) and the like are for Hydra to expand
        return []


def _compose(overrides: Sequence[str], config_dir: str | None) -> PawConfig:
    for text in overrides:
        _check_group(text)
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir: {config_dir} is no folder.")
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            config = compose("config", [*overrides, *search])
        except MissingConfigException as e:
            raise _explain_missing(e, overrides) from None
        except (HydraException, OmegaConfBaseException) as e:
            raise _explain(e) from None
        except AssertionError:  # Hydra's, of a key below one that is null
            raise _explain_null(overrides) from None
    return typed(config)


def _check_group(text: str) -> None:
    """`group=choice` with a choice that does not exist, or a group that does not."""
    key, _, value = text.lstrip("+~").partition("=")
    known = groups()
    if key == "model":
        raise ConfigError(
            f"{text}: say which of the two models: model@source={value} or model@target={value}."
        )
    if key in known and key != "experiment" and value in ("null", "") and "=" in text:
        raise ConfigError(f"{text}: a {key} must be chosen." + nearest(value, known[key]))
    if key in known or key.startswith("hydra") or "/" in key:
        return
    if "@" in key or ("." not in key and key not in _keys()):
        raise ConfigError(
            f"{key}: no such group or key." + nearest(key, [*known, *_keys()], limit=0)
        )


def _keys() -> set[str]:
    return {f.name for f in fields(PawConfig)}


def _explain_missing(error: MissingConfigException, overrides: Sequence[str]) -> ConfigError:
    missing = str(error.missing_cfg_file or "")
    group, _, choice = missing.rpartition("/")
    if group in ("", "schema/transfer"):
        return ConfigError(_first_line(error))
    asked = next(
        (o for o in overrides if o.endswith(f"={choice}") and o.lstrip("+").startswith(group)),
        f"{group}={choice}",
    )
    return ConfigError(
        f"{asked}: no {group} called {choice!r}." + nearest(choice, error.options or [])
    )


def _explain_null(overrides: Sequence[str]) -> ConfigError:
    """A tracker's key, where that tracker is not chosen."""
    asked = (o.lstrip("+").split("=")[0] for o in overrides if o.lstrip("+").startswith("tracker."))
    key = next((k for k in asked if k.count(".") == 2), "tracker")
    name = key.split(".")[1] if "." in key else "swanlab"
    return ConfigError(
        f"{key}: needs tracker={name}, or several as 'tracker=[{name},tensorboard]'."
    )


def _explain(error: Exception) -> ConfigError:
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
            parent, _, leaf = key.rpartition(".")
            return ConfigError(f"{key}: no such key." + nearest(leaf, _names_at(parent), limit=12))
        if isinstance(cause, MissingMandatoryValue):
            return ConfigError(f"{key}: a value is missing. Set it with {key}=VALUE.")
        return ConfigError(f"{key}: {text}" if key and key not in text else text)
    if isinstance(error, ConfigCompositionException):
        match = re.search(r"Could not override '([^']+)'", str(error))
        if match:
            parent, _, leaf = match[1].rpartition(".")
            return ConfigError(
                f"{match[1]}: no such key." + nearest(leaf, _names_at(parent), limit=12)
            )
    return ConfigError(_first_line(error))


def _names_at(parent: str) -> list[str]:
    """The keys of the schema under a dotted key."""
    node: Any = PawConfig
    for part in filter(None, parent.split(".")):
        found = {f.name: f for f in fields(node)} if is_dataclass(node) else {}
        if part not in found:
            return []
        node = _dataclass_named(str(found[part].type))
    return (
        list(dict.fromkeys(f.name for kind in _with_subclasses(node) for f in fields(kind)))
        if is_dataclass(node)
        else []
    )


def _with_subclasses(kind: Any) -> list[Any]:
    """A schema and those of its methods, which have keys of their own."""
    return [kind, *(deeper for sub in kind.__subclasses__() for deeper in _with_subclasses(sub))]


def _dataclass_named(annotation: str) -> Any:
    from paw.cli import schema

    return next(
        (
            getattr(schema, n)
            for n in re.findall(r"\w+", annotation)
            if is_dataclass(getattr(schema, n, None))
        ),
        None,
    )


def _walk(config: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig, Any]]:
    for key in config:
        yield f"{path}{key!s}", config, key
        if not OmegaConf.is_missing(config, key) and isinstance(config._get_node(key), DictConfig):
            node = config._get_node(key)
            assert isinstance(node, DictConfig)
            if not node._is_none() and not node._is_interpolation():
                yield from _walk(node, f"{path}{key!s}.")


def _refuse_unknown_keys(config: DictConfig) -> None:
    """`+source.nmae=x` gets past the schema, which is what `+` is for; refuse it all the same."""
    for path, parent, key in _walk(config):
        kind = OmegaConf.get_type(parent)
        if is_dataclass(kind) and key not in {f.name for f in fields(kind)}:
            raise ConfigError(
                f"{path}: no such key."
                + nearest(str(key), [f.name for f in fields(kind)], limit=12)
            )


def _refuse_missing(config: DictConfig) -> None:
    for path, parent, key in _walk(config):
        if OmegaConf.is_missing(parent, key):
            raise ConfigError(f"{path}: a value is missing. Set it with {path}=VALUE.")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
