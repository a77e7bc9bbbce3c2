"""task=validate: everything short of running. One composition, or with everything=true all of conf/; exit code 0 or 2."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paw.cli.compose import compose_config, groups, model_named
from paw.cli.schema import PawConfig
from paw.console import Console
from paw.data.config import DatasetConfig
from paw.data.load import examples, preferences, split_file
from paw.errors import ConfigError, PawError
from paw.models.config import ModelConfig
from paw.models.load import has_driver, resolve_runtime
from paw.models.locate import at_hand, locate, on_hub
from paw.tasks.stages import check_adapter, check_training
from paw.text import markdown_table
from paw.training.train import MICRO

log = logging.getLogger("paw")
Row = tuple[str, str, str]  # what, ok or wrong or absent, and what was found


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> list[Row]:
    """Prints a table of what was checked.

    Raises:
        ConfigError: with the number of checks that failed.
    """
    console = Console()
    named = any(o.startswith(("model@target", "target.", "experiment")) for o in overrides)
    rows = list(_everything(config) if config.everything else _one(config, console, named))
    console.close()
    log.info("%s", markdown_table([["check", "", "found"], *map(list, rows)]))
    wrong = [row for row in rows if row[1] == "wrong"]
    if wrong:
        raise ConfigError(
            f"task=validate: {len(wrong)} of {len(rows)} checks failed, the first is {wrong[0][0]}: {wrong[0][2]}"
        )
    absent = sum(row[1] == "absent" for row in rows)
    log.info(
        "\n%d checks, none failed%s.",
        len(rows),
        f"; {absent} models and data sets are not on this machine" if absent else "",
    )
    return rows


def _check(what: str, look: Callable[[], str]) -> Row:
    try:
        return what, "ok", look()
    except PawError as e:
        return what, "wrong", str(e)


# ---- one composition --------------------------------------------------------------------------------


def _one(config: PawConfig, console: Console, target: bool) -> Iterator[Row]:
    """
    Args:
        target: whether the command line names one; else it is the default's.
    """
    yield "composition", "ok", "keys, types and values"
    yield _check("hardware", lambda: _hardware(config))
    yield "make gpu", "ok", _gpu_checks()
    folders: dict[str, Path] = {}
    for side, model in (
        ("source", config.source),
        *([("target", config.target)] if target else []),
    ):

        def look(side: str = side, model: ModelConfig = model) -> str:
            if at_hand(model, config.paths.models_dir) is None and model.hub and not model.path:
                return on_hub(model)  # nothing is fetched
            folders[side] = locate(model, config.paths.models_dir, console)
            return f"{model.name} in {folders[side]}"

        yield _check(f"model@{side}", look)
    c = config.dataset
    splits = {"train": c.train_split, "test": config.evaluate.split or c.eval_split} | (
        {"validation": c.val_split} if c.val_split else {}
    )
    for name, split in splits.items():
        yield _check(f"dataset, {name} split", lambda split=split: _rows(config, split, console))  # type: ignore[misc]
    for side, folder in folders.items():
        yield _check(f"adapter on {side}", lambda folder=folder: check_adapter(config, folder))  # type: ignore[misc]
        yield _check(f"memory for {side}", lambda folder=folder: _memory(config, folder))  # type: ignore[misc]
    yield _check("outputs", lambda: _writable(config.paths.outputs))


def _hardware(config: PawConfig) -> str:
    runtime = resolve_runtime(config.hardware)
    check_training(config, runtime)
    return f"{runtime.devices} × {runtime.device}, {runtime.precision}"


def _gpu_checks() -> str:
    """What of `make gpu`, the first check of a server, applies to this machine."""
    if not has_driver():
        return "no NVIDIA GPU here: it would name and skip all of its steps"
    import torch

    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not names:
        return "an NVIDIA driver, but this torch sees no GPU: install its CUDA build"
    several = (
        "strategies on all of them" if names.total() > 1 else "without what needs several GPUs"
    )
    return f"applies: {', '.join(f'{n} × {name}' for name, n in names.items())}; {several}"


def _rows(config: PawConfig, split: str, console: Console) -> str:
    file = split_file(config.dataset, split, config.paths.data_dir, console)
    if config.dataset.name == "own_preferences":
        return f"{len(preferences(file, config.dataset, split))} pairs in {file}"
    found = examples(file, config.dataset, split, config.evaluate.form(config.dataset.kind))
    return f"{len(found)} examples in {file}"


def _memory(config: PawConfig, folder: Path) -> str:
    from paw.models.memory import estimate

    runtime, t = resolve_runtime(config.hardware), config.train
    tokens = -(-t.batch_size // (t.accumulate or 1)) * t.max_length
    if t.accumulate is None and runtime.device == "cpu":
        tokens = min(tokens, max(MICRO, t.max_length))
    shards = runtime.devices if runtime.strategy == "fsdp" else 1
    found = estimate(
        folder, config.adapter, runtime.precision, tokens, shards, t.gradient_checkpointing
    )
    parts = f"{found.weights:.1f} weights, {found.adapter:.1f} adapter, {found.activations:.1f} activations, {found.logits:.1f} logits"
    said = f"at most about {found.total:.1f} GiB a device ({parts}) with micro-batches of {tokens} tokens"
    room = _room(config, runtime.device)
    if room is not None and found.weights + found.adapter > room:
        raise ConfigError(
            f"{said}; a device has {room:.0f}. Choose adapter=qlora, hardware.strategy=fsdp or a smaller model."
        )
    if room is not None and found.total > room:
        return f"{said}; a device has {room:.0f}, so that micro-batches will be halved (train.accumulate)"
    return said


def _room(config: PawConfig, device: str) -> float | None:
    if config.hardware.memory_gb is not None:
        return config.hardware.memory_gb
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)
    import psutil

    return float(psutil.virtual_memory().total / 2**30)


def _writable(folder: str) -> str:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    if not os.access(path, os.W_OK):
        raise ConfigError(f"paths.outputs: {path} cannot be written to.")
    return str(Path(folder).resolve())


# ---- all of conf/ -----------------------------------------------------------------------------------


def _everything(config: PawConfig) -> Iterator[Row]:
    for group, choices in groups().items():
        if group == "model@target":
            continue
        for choice in choices:
            # not all of them have a pipeline
            extra = ["task=train"] if group in ("dataset", "adapter") else []
            look = partial(_composes, [f"{group}={choice}", *extra])
            yield _check(f"{group}={choice}", look)
    for name in groups()["model@source"]:
        place = at_hand(model_named(name), config.paths.models_dir)
        yield f"model {name}", "ok" if place else "absent", place or "not on this machine"
    for name in groups()["dataset"]:
        dataset = compose_config([f"dataset={name}", "task=train"]).dataset
        place = _data_at_hand(dataset, config.paths.data_dir)
        yield f"dataset {name}", "ok" if place else "absent", place or "not on this machine"


def _composes(asked: list[str]) -> str:
    compose_config(asked)
    return "composes"


def _data_at_hand(dataset: DatasetConfig, data_dir: str | None) -> str | None:
    folders: list[Any] = [dataset.path, Path(data_dir) / dataset.name if data_dir else None]
    return next((str(f) for f in folders if f and Path(f).expanduser().exists()), None)
