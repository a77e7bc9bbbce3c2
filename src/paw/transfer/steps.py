"""Steps of this part, and what a task that transfers reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from paw.config.common import RunConfig
from paw.data.config import DatasetConfig
from paw.graph import Check, Node, Source, Step
from paw.models.adapters import is_factors
from paw.models.load import resolve_runtime
from paw.models.steps import Base
from paw.store import Store
from paw.transfer.calibrate import STAGE as CALIBRATE
from paw.transfer.checks import check_calibration, check_controls, check_fits, check_transfer
from paw.transfer.config import PlaceboConfig, TransferConfig
from paw.transfer.configs import (
    calibrate_config,
    gate_config,
    match_config,
    needs_match,
    needs_moments,
    needs_text,
    spoil_config,
    text_config,
    transfer_config,
)
from paw.transfer.controls import methods as methods_of
from paw.transfer.controls import real_method, shuffle_of
from paw.transfer.gate import STAGE as GATE
from paw.transfer.gate import GateResult
from paw.transfer.match import STAGE as MATCH
from paw.transfer.model_pair import calibration_file
from paw.transfer.spoil import STAGE as SPOIL
from paw.transfer.transfer import STAGE as TRANSFER
from paw.transfer.transfer import TransferResult


@dataclass
class Transfers(RunConfig):
    """What a task that transfers reads."""

    dataset: DatasetConfig = MISSING
    transfer: TransferConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_controls(self.transfer)


def methods(c: Transfers) -> list[TransferConfig]:
    """The configured method, then what stands beside it."""
    return methods_of(c.transfer, c.seed)


def transfer(
    c: Transfers, adapter: Node, source: Base, target: Base, method: TransferConfig | None = None
) -> Step[Any]:
    """The source's adapter on the target by one method; by a placebo, what that leaves of the
    method it spoils."""
    method = method or c.transfer
    real, shuffle = real_method(method, c.transfer), shuffle_of(method)
    if real is method or shuffle is not None:
        return _transfer(c, adapter, source, target, real, shuffle)
    assert isinstance(method, PlaceboConfig)
    moved = _transfer(c, adapter, source, target, real)
    return Step(
        stage=SPOIL,
        name=f"spoil {real.method} by {method.method}, seed {method.seed}",
        config=spoil_config(method),
        inputs={"adapter": moved},
    )


def real_transfer(moved: Step[Any]) -> Step[TransferResult]:
    """The transfer itself, before the gate, of an adapter that may be spoilt."""
    gated = moved if moved.stage is GATE else moved.inputs["adapter"]
    assert isinstance(gated, Step)
    found = gated.inputs["moved"]
    assert isinstance(found, Step)
    return found


def fits(adapter: Node, base: Base) -> Check:
    """That an adapter of factors from elsewhere fits its base: not after everything else has been
    computed."""

    def look(store: Store) -> str:
        if isinstance(adapter, Source) and is_factors(adapter.path):
            check_fits(adapter.path, base.path, "target")
        return f"fits {base.name}"

    return Check(name=f"{adapter.name} on {base.name}", look=look)


def _transfer(
    c: Transfers,
    adapter: Node,
    source: Base,
    target: Base,
    method: TransferConfig,
    shuffle: int | None = None,
) -> Step[GateResult]:
    trust = (source.config.trust_remote_code, target.config.trust_remote_code)
    text = text_config(method, resolve_runtime(c.hardware), trust, shuffle)
    seen: dict[str, Node] = {"calibration": _text(c, method)} if needs_text(method) else {}
    models: dict[str, Node] = {"source": source.node, "target": target.node}
    inputs: dict[str, Node] = {"adapter": adapter, **models, **(seen if method.uses_text else {})}
    # the similarity of all layers to all, where it is asked for; and where a text is run anyway,
    # since the report shows it
    if needs_match(method) or method.uses_text:
        inputs["match"] = Step(
            stage=MATCH,
            name=f"compare the layers of {source.name} and {target.name}",
            config=match_config(method, text, _bases(c)),
            inputs={**models, **({} if method.layers == "similarity" else seen)},
        )
    if needs_moments(method):
        matched = {"match": inputs["match"]} if needs_match(method) else {}
        inputs["moments"] = Step(
            stage=CALIBRATE,
            name=f"calibrate {source.name} and {target.name}",
            config=calibrate_config(method, text),
            inputs={**models, **matched, **seen},
        )
    paired = "" if shuffle is None else f", positions paired at random, seed {shuffle}"
    moved = Step(
        stage=TRANSFER,
        name=f"transfer by {method.method}{paired}",
        config=transfer_config(method, text, _bases(c)),
        inputs=inputs,
        checks=_checks(c, adapter, source, target, method),
    )
    pictured = {"match": inputs["match"]} if "match" in inputs else {}
    return Step(
        stage=GATE,
        name=f"gate {method.method}{paired} at {method.similarity_threshold:g}",
        config=gate_config(method, target.config.hub),
        inputs={"moved": moved, "adapter": adapter, **models, **pictured},
    )


def _text(c: Transfers, method: TransferConfig) -> Source:
    file = calibration_file(method, c.dataset)

    def get() -> Path:
        check_calibration(method, c.dataset)
        return file

    return Source(
        name=f"text {file}",
        described=["text", str(file)],
        finder=get,
        getter=lambda watch: get(),
    )


def _checks(
    c: Transfers, adapter: Node, source: Base, target: Base, method: TransferConfig
) -> list[Check]:
    """What an adapter from elsewhere may have wrong is said before anything is computed."""

    def look(store: Store) -> str:
        if isinstance(adapter, Source):
            check_transfer(adapter.path, source.path, target.path, method.modules)
        return f"{source.name} to {target.name}"

    return [Check(name=f"transfer to {target.name}", look=look)]


def _bases(c: RunConfig) -> str:
    """Where singular bases are kept: they are the models', not one stage's."""
    return str(Path(c.paths.artifacts) / "bases")
