"""task=validate: everything short of running. One composition, or with everything=true all of
conf/; exit code 0 or 2."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from paw.cli.compose import compose_config, groups
from paw.console import Console
from paw.data.steps import split
from paw.errors import ConfigError, PawError
from paw.evaluation.steps import evaluate
from paw.generator.steps import Generates
from paw.graph import Absent, Node, Source, sources_of
from paw.launch.check import checks_of
from paw.launch.outline import Outline, Row
from paw.launch.run import store_of
from paw.models.config import ModelConfig
from paw.models.load import has_driver
from paw.models.locate import at_hand
from paw.models.steps import base, model_named
from paw.text import markdown_table
from paw.training.steps import Prefers, Trains, prefer, train
from paw.transfer.steps import Transfers, methods, transfer

log = logging.getLogger("paw")
Line = tuple[str, str, str]  # what, ok or wrong or absent, and what was found


@dataclass
class Config(Transfers, Prefers, Generates):
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING
    # every model, data set, adapter and experiment in conf/ instead of this composition
    everything: bool = False


def run(c: Config, overrides: Sequence[str], run_dir: str | None = None) -> list[Line]:
    """Prints a table of what was checked.

    Raises:
        ConfigError: with the number of checks that failed.
    """
    console = Console(c.verbosity)
    named = any(o.startswith(("model@target", "target.", "experiment")) for o in overrides)
    lines = list(_everything(c) if c.everything else _one(c, console, target=named))
    console.close()
    log.info("%s", markdown_table([["check", "", "found"], *map(list, lines)]))
    wrong = [line for line in lines if line[1] == "wrong"]
    if wrong:
        raise ConfigError(
            f"task=validate: {len(wrong)} of {len(lines)} checks failed, the first is "
            f"{wrong[0][0]}: {wrong[0][2]}"
        )
    absent = sum(line[1] == "absent" for line in lines)
    away = f"; {absent} models and data sets are not on this machine" if absent else ""
    log.info("\n%d checks, none failed%s.", len(lines), away)
    return lines


def _check(what: str, look: Callable[[], str]) -> Line:
    try:
        return what, "ok", look()
    except Absent as e:
        return what, "absent", str(e)
    except PawError as e:
        return what, "wrong", str(e)


# ---- one composition ------------------------------------------------------------------------


def _one(c: Config, console: Console, *, target: bool) -> Iterator[Line]:
    """
    Args:
        target: whether the command line names one; else it is the default's.
    """
    store, outline = store_of(c), _graph(c, target)
    yield "composition", "ok", "keys, types and values"
    yield "make gpu", "ok", _gpu_checks()
    for source in sources_of(outline.nodes):
        yield _check(source.name, partial(_found, source, console))
    for check in checks_of(c, outline):
        what, state, found = _check(check.name, partial(check.look, store))
        if check.warns and state == "ok" and found:
            yield what, "warning", found
        elif state != "absent" and not check.warns:  # what is absent has its own line
            yield what, state, found
    yield _check("outputs", lambda: _writable(c.paths.outputs))


def _graph(c: Config, target: bool) -> Outline:
    """The trainings and evaluations of a composition, and its transfers where it can have any."""
    source, other = base(c, c.source), base(c, c.target)
    if c.dataset.kind == "preference":
        return Outline(label="validate", first=[prefer(c, source)])
    bases = [source, *[other][: int(target)]]
    adapters: list[Node] = [train(c, one) for one in bases]
    systems = [
        Row(evaluation=evaluate(c, one, adapter), model=one.name)
        for one, adapter in zip(bases, adapters, strict=True)
    ]
    if target and c.adapter.transferable and c.evaluate.mode != "classify":
        adapters += [transfer(c, adapters[0], source, other, method) for method in methods(c)]
    kept = c.dataset.val_split  # it is read whether this training validates or not
    unread = [split(c, c.dataset, kept, c.form)] if kept and c.train.val_every is None else []
    return Outline(label="validate", first=[*adapters, *unread], systems=systems)


def _found(source: Source, console: Console) -> str:
    if source.find() is None and source.elsewhere is not None:
        return source.elsewhere()  # nothing is fetched
    return str(source.get(console))


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


def _writable(folder: str) -> str:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    if not os.access(path, os.W_OK):
        raise ConfigError(f"paths.outputs: {path} cannot be written to.")
    return str(Path(folder).resolve())


# ---- all of conf/ ---------------------------------------------------------------------------


def _everything(c: Config) -> Iterator[Line]:
    for group, choices in groups().items():
        if group == "model@target":
            continue
        for choice in choices:
            # not all of them have a pipeline
            extra = ["task=train"] if group in ("dataset", "adapter") else []
            yield _check(f"{group}={choice}", partial(_composes, [f"{group}={choice}", *extra]))
    for name in groups()["model@source"]:
        place = at_hand(model_named(name), c.paths.models_dir)
        yield f"model {name}", "ok" if place else "absent", place or "not on this machine"
    for name in groups()["dataset"]:
        place = _data_at_hand(name, c.paths.data_dir)
        yield f"dataset {name}", "ok" if place else "absent", place or "not on this machine"


def _composes(asked: list[str]) -> str:
    compose_config(asked)
    return "composes"


def _data_at_hand(name: str, data_dir: str | None) -> str | None:
    asked = compose_config([f"dataset={name}", "task=train"])
    assert isinstance(asked, Trains)
    places = [asked.dataset.path, Path(data_dir) / name if data_dir else None]
    return next((str(p) for p in places if p and Path(p).expanduser().exists()), None)
