"""Stage `train`: an adapter of one base on one split."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.data.encode import Rows
from paw.errors import ConfigError, DataError, StageError
from paw.models.load import Runtime
from paw.store import (
    BEGUN,
    TOKENIZER,
    Context,
    Input,
    Stage,
    Watch,
    free_memory,
    replacing,
    write_text,
)
from paw.training.adapters import AdapterConfig, method_named
from paw.training.batches import per_epoch, step_rows
from paw.training.checks import check_resume
from paw.training.config import TrainConfig
from paw.training.files import BEST, CHECKPOINT, LAST, TRAIL, held_steps, recover
from paw.training.history import CURVE, TIMES

if TYPE_CHECKING:
    from paw.training.fit import Plan

SEEN = "seen.jsonl"
MICRO = 640  # tokens of a micro-batch on a CPU


@dataclass(kw_only=True)
class TrainStage:
    adapter: AdapterConfig
    train: TrainConfig
    runtime: Runtime
    devices: int = 1  # a step sees devices × batch_size examples
    classify: bool = False
    name: str | None = transient(None)  # the base's on the hub, written into adapter_config.json
    data_name: str = transient("")  # for the card
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    steps: int
    examples: int
    train_loss: float  # the mean over the last tenth of the steps
    packed: bool
    accumulate: int  # micro-batches of a step
    gradient_checkpointing: bool
    strategy: str
    devices: int
    trainable: int  # parameters
    tokens: int  # of all steps
    tokens_per_second: float
    mfu: float | None = None  # model FLOPs utilisation, 0 to 1, where the device's peak is known
    skipped: int = 0  # steps left out because their float16 gradients overflowed
    # mean losses of the validations
    val_start: float | None = None
    val_best: float | None = None
    best_step: int | None = None

    def __str__(self) -> str:
        more = ""
        if self.val_best is not None:
            more = (
                f"; validated: {self.val_start:.3f} at the start, {self.val_best:.3f} at step "
                f"{self.best_step}"
            )
        if self.skipped:
            more += f"; {self.skipped} steps left out, their float16 gradients overflowed"
        if self.mfu is not None:
            more += f"; {self.mfu:.0%} of the device's peak (MFU)"
        return (
            f"{self.steps} steps, loss {self.train_loss:.3f} at the end{more}; "
            f"{self.tokens_per_second:.0f} tokens a second, {'packed' if self.packed else 'padded'}"
        )


STAGE = Stage(
    "train",
    "3",
    "paw.training.train:train",
    config=TrainStage,
    result=TrainResult,
    resumes=True,
    devices="all",
)


def train(
    config: TrainStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> TrainResult:
    """Trains an adapter on the answers, or the classes, of every example.

    Args:
        inputs: `model`, `rows`, and `val_rows` where there is validation: finished `encode` stages;
            `start`, an adapter of the base to begin with, unless it begins fresh.

    Writes a PEFT folder with a card, the tokenizer and its base's fingerprint: the best adapter by
    validation (and `last/`), or the last one; and the loss of every step. With train.keep_every
    also `trail/`: adapters on the way, and seen.jsonl, which examples each has seen since the last.

    Raises:
        ConfigError: where the steps end before the first validation, or train.resume is another
            training's.
        DataError: for fewer examples than devices, or other classes in the validation split.
        StageError: where a loss is not finite, or a single example does not fit into memory.
    """
    from paw.models.adapters import stamp

    unfinished, rows = context.unfinished, Rows(inputs["rows"].path)
    plan = _plan(config, inputs, rows, unfinished)
    _resume(config.train, unfinished, context)
    result = fitted(plan, len(rows), context)
    validated = result.val_best is not None
    shutil.copytree(unfinished / (BEST if validated else LAST), out, dirs_exist_ok=True)
    if validated:
        shutil.copytree(unfinished / LAST, out / LAST)
    for name in (CURVE, TIMES):
        shutil.copyfile(unfinished / name, out / name)
    if config.train.keep_every:
        shutil.copytree(unfinished / TRAIL, out / TRAIL)
        _tell_seen(out / TRAIL, config, rows, result)
    about: dict[str, Any] = {"method": config.adapter.method, "quantise": config.adapter.quantise}
    if config.classify:
        about["classes"] = rows.classes
    stamp(out, inputs["model"].fingerprint, made_by="train", **about)
    _card(out, config, inputs["model"].path, result)
    return result


def fitted(plan: Plan, rows: int, watch: Watch) -> TrainResult:
    """Trains to the plan's end, on less at once where memory runs out. What is left in the plan's
    folder: see `paw.training.fit.fit`.

    Raises:
        StageError: where a loss is not finite, or a single example does not fit into memory.
    """
    from paw.training.fit import RESULT

    while not _fits(plan, watch):
        free_memory()  # only now: as long as the error was handled, its traceback held the model
        recover(plan.folder)
        plan = _smaller(plan, rows, watch)
    return STAGE.restored(json.loads((plan.folder / RESULT).read_text()))


def _plan(config: TrainStage, inputs: Mapping[str, Input], rows: Rows, unfinished: Path) -> Plan:
    """
    Raises:
        ConfigError, DataError: see `train`.
    """
    from paw.training.fit import Plan

    c, model = config.train, inputs["model"].path
    if len(rows) < config.devices:
        raise DataError(
            f"{config.data_name}: {len(rows)} usable examples for {config.devices} devices. Use "
            "fewer."
        )
    val_rows = inputs["val_rows"].path if c.val_every else None
    if config.classify and val_rows and (found := Rows(val_rows).classes) != rows.classes:
        raise DataError(
            f"{config.data_name}: the validation split has the classes {found}, the training split "
            f"{rows.classes}."
        )
    steps = c.max_steps
    if c.epochs is not None:
        size = min(c.batch_size * config.devices, len(rows))
        steps = max(1, round(c.epochs * per_epoch(len(rows), size)))
    c.check_validated(steps)
    return Plan(
        model=model,
        name=config.name or str(model),
        trust_remote_code=config.trust_remote_code,
        runtime=replace(config.runtime, devices=config.devices),
        adapter=config.adapter,
        train=c,
        rows=inputs["rows"].path,
        val_rows=val_rows,
        classify=config.classify,
        steps=steps,
        accumulate=accumulated(c, config.runtime, config.devices, rows),
        gradient_checkpointing=c.gradient_checkpointing,
        folder=unfinished,
        start=inputs["start"].path if "start" in inputs else None,
    )


def _tell_seen(trail: Path, config: TrainStage, rows: Rows, result: TrainResult) -> None:
    """Writes the ids of the examples behind every adapter of a trail: {step, examples}."""
    every, c = config.train.keep_every, config.train
    assert every is not None
    size = min(c.batch_size * config.devices, len(rows))
    steps, names = step_rows(rows.lengths, size, c.seed, not result.packed), rows.names
    picked = [[names[i] for i in one] for one in islice(steps, result.steps)]
    lines = [
        {"step": end, "examples": [name for one in picked[end - every : end] for name in one]}
        for end in range(every, result.steps + 1, every)
    ]
    write_text(trail / SEEN, "".join(json.dumps(line) + "\n" for line in lines))


def _fits(plan: Plan, watch: Watch) -> bool:
    """Trains; False where memory ran out."""
    from paw.training.fit import OutOfMemory, fit

    try:
        fit(plan, watch)
    except OutOfMemory:
        return False
    return True


def _most(train: TrainConfig, rows: int, devices: int) -> int:
    """Examples of a step in each process: no more micro-batches than that."""
    return max(1, min(train.batch_size, rows // devices))


def accumulated(train: TrainConfig, runtime: Runtime, devices: int, rows: Rows) -> int:
    """Micro-batches of a step. Small ones cost a GPU its parallelism; a CPU computes as fast on
    what its caches hold, in a fraction of the memory."""
    most = _most(train, len(rows), devices)
    wanted = train.accumulate
    if wanted is None:
        on_gpu = runtime.device == "cuda"
        wanted = 1 if on_gpu else math.ceil(most * float(rows.lengths.mean()) / MICRO)
    return min(wanted, most)


def _resume(c: TrainConfig, unfinished: Path, watch: Watch) -> None:
    """Prepares the folder of what was left for going on as train.resume says.

    Raises:
        ConfigError: for a folder that holds the beginning of another training: what differs is
            said.
    """
    given = check_resume(c.resume)
    for folder in filter(None, (unfinished, given)):
        recover(folder)
    if c.resume == "never":
        for file in unfinished.iterdir():
            if file.name != BEGUN:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    if given is not None:
        there, here = (json.loads((folder / BEGUN).read_text()) for folder in (given, unfinished))
        if there != here:
            raise ConfigError(
                f"train.resume: {given} is the beginning of another training: "
                f"{_differ(there, here)}. Leave train.resume out, or set these as they were."
            )
        # not twice: this one may have got further since
        if held_steps(given) > held_steps(unfinished):
            others = shutil.ignore_patterns(CHECKPOINT)
            shutil.copytree(given, unfinished, dirs_exist_ok=True, ignore=others)
            with replacing(unfinished / CHECKPOINT) as beside:
                shutil.copyfile(given / CHECKPOINT, beside)
    if done := held_steps(unfinished):
        watch.say(
            f"goes on after step {done}, where it was stopped (train.resume=never begins again)"
        )


def _differ(there: Any, here: Any, path: str = "") -> str:
    """The first few values that differ, by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in sorted(set(there) | set(here)) if there.get(k) != here.get(k)]
        found = [_differ(there.get(k), here.get(k), f"{path}.{k}".lstrip(".")) for k in keys[:3]]
        return ", ".join(filter(None, found))
    return f"{path.removeprefix('config.')} was {there}, is {here}"


def _smaller(plan: Plan, rows: int, watch: Watch) -> Plan:
    """Half the micro-batch and twice the accumulation; where it is single examples already,
    activations are recomputed.

    Raises:
        StageError: where that is done already.
    """
    most = _most(plan.train, rows, plan.runtime.devices)
    if plan.accumulate < most:
        more = min(most, 2 * plan.accumulate)
        now, before = math.ceil(most / more), math.ceil(most / plan.accumulate)
        watch.say(
            f"out of memory: micro-batches of {now} examples instead of {before} "
            f"(train.accumulate={more} starts like that); a step is the same"
        )
        return replace(plan, accumulate=more)
    if not plan.gradient_checkpointing and method_named(plan.adapter.method).recomputes:
        watch.say(
            "out of memory with single examples: activations are recomputed from here "
            "(train.gradient_checkpointing=true)"
        )
        return replace(plan, gradient_checkpointing=True)
    raise StageError(
        "train: one example does not fit into memory. Lower train.max_length, choose "
        "adapter=qlora, or a device with more of it."
    )


def _card(out: Path, config: TrainStage, model: Path, result: TrainResult) -> None:
    """The model card, and the base's tokenizer beside it."""
    for name in TOKENIZER:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    base, examples = config.name or model, config.devices * config.train.batch_size
    validated = ""
    if result.val_best is not None:
        validated = (
            f" Validation loss {result.val_start:.4f} at the start, {result.val_best:.4f} at step "
            f"{result.best_step}, which this is."
        )
    kind = "SequenceClassification" if config.classify else "CausalLM"
    text = f"""---
base_model: {base}
library_name: peft
tags: [paw]
---

# {config.adapter.method} for {base}

Trained by paw on {config.data_name}: {result.steps} steps of {examples} examples, learning rate
{config.train.lr:g}, {result.trainable:,} parameters, loss {result.train_loss:.4f} over the last \
tenth of the steps.{validated}

    from peft import AutoPeftModelFor{kind}
"""
    write_text(out / "README.md", text)
