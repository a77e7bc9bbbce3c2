"""Steps of this part, and what a task that trains reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from paw.data.encode import STAGE as ENCODE
from paw.data.encode import EncodeResult, EncodeStage
from paw.data.kinds import kind_named
from paw.data.steps import split
from paw.errors import ConfigError
from paw.evaluation.steps import Evaluates, usable
from paw.graph import Check, Node, Source, Step, View
from paw.models.load import resolve_runtime
from paw.models.steps import Base, attached
from paw.store import Store
from paw.training.adapters import AdapterConfig
from paw.training.checks import check_adapter, check_prefer, check_training
from paw.training.config import PreferConfig, TrainConfig
from paw.training.memory import check_memory
from paw.training.prefer import STAGE as PREFER
from paw.training.prefer import PreferResult, PreferStage
from paw.training.train import STAGE as TRAIN
from paw.training.train import TrainResult, TrainStage


@dataclass
class Trains(Evaluates):
    """What a task that trains reads."""

    adapter: AdapterConfig = MISSING
    train: TrainConfig = MISSING


def train(
    c: Trains,
    base: Base,
    *,
    start: Node | None = None,
    only: tuple[Node | View, int] | None = None,
    name: str | None = None,
) -> Step[TrainResult]:
    """A base's own adapter on the training split.

    Args:
        start: an adapter to begin with; else it begins fresh.
        only: groups of examples, and the number of the one that is trained on.
        name: of the step.
    """
    runtime = resolve_runtime(c.hardware)
    inputs: dict[str, Node | View] = {
        "model": base.node,
        "rows": encode(c, base, c.dataset.train_split, only=only),
    }
    if start is not None:
        inputs["start"] = attached(start)
    if c.train.val_every is not None:
        inputs["val_rows"] = encode(c, base, _val_split(c), c.train.val_limit)
    if runtime.deepspeed is not None:
        # check_training says what is wrong with it
        inputs["deepspeed"] = Source.at("hardware.deepspeed", Path(runtime.deepspeed))
    config = TrainStage(
        adapter=replace(c.adapter, path=None),
        train=c.train,
        runtime=runtime,
        devices=runtime.devices * runtime.nodes,
        classify=c.evaluate.mode == "classify",
        name=base.config.hub,
        data_name=c.dataset.name,
        trust_remote_code=base.config.trust_remote_code,
    )
    return Step(
        stage=TRAIN,
        name=name or f"train {base.name}",
        config=config,
        inputs=inputs,
        checks=[
            _check("training", partial(check_training, c.train, c.adapter, runtime)),
            *_checks(c, base),
        ],
    )


def encode(
    c: Trains,
    base: Base,
    name: str,
    limit: int | None = None,
    only: tuple[Node | View, int] | None = None,
) -> Step[EncodeResult]:
    """A split as tokens of a base; of groups of its examples only one, by its number."""
    config = EncodeStage(
        dataset=c.dataset,
        split=name,
        form=c.form,
        close=kind_named(c.dataset.kind).written,
        max_length=c.train.max_length,
        virtual=c.adapter.virtual_tokens,
        limit=limit,
        group=only[1] if only else None,
        trust_remote_code=base.config.trust_remote_code,
    )
    inputs: dict[str, Node | View] = {
        "data": split(c, c.dataset, name, c.form),
        "tokenizer": base.tokenizer,
    }
    if only:
        inputs["groups"] = only[0]
    return Step(stage=ENCODE, name=f"encode {name} for {base.name}", config=config, inputs=inputs)


@dataclass
class Prefers(Trains):
    """What a task that trains by preferences reads."""

    prefer: PreferConfig = field(default_factory=PreferConfig)


def prefer(c: Prefers, base: Base) -> Step[PreferResult]:
    """A base's adapter by direct preference optimisation on the training split."""
    runtime = resolve_runtime(c.hardware)
    config = PreferStage(
        dataset=c.dataset,
        split=c.dataset.train_split,
        adapter=replace(c.adapter, path=None),
        train=c.train,
        prefer=c.prefer,
        runtime=runtime,
        name=base.config.hub,
        trust_remote_code=base.config.trust_remote_code,
    )
    return Step(
        stage=PREFER,
        name=f"prefer {base.name}",
        config=config,
        inputs={"model": base.node, "data": split(c, c.dataset, c.dataset.train_split)},
        checks=[
            _check("task=prefer", partial(check_prefer, c.train, c.adapter, runtime.devices)),
            *_checks(c, base),
        ],
    )


def _checks(c: Trains, base: Base) -> list[Check]:
    """What of a training can be known of the model that it is of."""

    def adapter(store: Store) -> str:
        return check_adapter(c.adapter, base.path)

    def memory(store: Store) -> str:
        return check_memory(base.path, c.adapter, c.train, c.hardware)

    return [
        usable(c, base),
        Check(name=f"adapter on {base.name}", look=adapter, of=base.node.identity),
        Check(name=f"memory for {base.name}", look=memory, thorough=True, of=base.node.identity),
    ]


def _check(name: str, rules: Callable[[], None]) -> Check:
    def look(store: Store) -> str:
        rules()
        return "can be done"

    return Check(name=name, look=look)


def _val_split(c: Trains) -> str:
    """
    Raises:
        ConfigError: where the data set names none.
    """
    if c.dataset.val_split is None:
        raise ConfigError(
            f"train.val_every: {c.dataset.name} has no split for validation that is neither "
            "trained on nor tested. Set one aside: 'dataset.train_split=\"train[:95%]\"' "
            "'dataset.val_split=\"train[95%:]\"'."
        )
    return c.dataset.val_split
