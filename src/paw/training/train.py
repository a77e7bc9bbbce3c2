"""Stage `train`: an adapter of one base on one split."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paw.config.adapters import AdapterConfig
from paw.config.checks import transient
from paw.data.encode import Rows
from paw.errors import ConfigError, DataError, StageError
from paw.models.load import Runtime
from paw.store import BEGUN, TOKENIZER, Input, Stage, Watch, free_memory, replacing, write_text
from paw.training.config import TrainConfig
from paw.training.fit import FACTS, OutOfMemory, Plan, fit, steps_of

MICRO = 640  # tokens of a micro-batch on a CPU
STAGE = Stage("train", "3", "paw.training.train:train", resumes=True)


@dataclass
class TrainStage:
    adapter: AdapterConfig
    train: TrainConfig
    runtime: Runtime
    devices: int = 1  # a step sees devices × batch_size examples
    classify: bool = False
    classes: tuple[str, ...] | None = None  # of a classifier; without, a value is to be found
    base_name: str | None = transient(None)  # written into adapter_config.json
    data_name: str = transient("")  # for the card
    trust_remote_code: bool = transient(False)


def train(
    config: TrainStage, inputs: Mapping[str, Input], out: Path, watch: Watch, unfinished: Path
) -> dict[str, Any]:
    """Trains an adapter on the answers, or the classes, of every example.

    Args:
        inputs: `model`, `rows`, and `val_rows` where there is validation: finished `encode` stages.
        unfinished: what a stopped training left, and this one leaves if it is stopped.

    Writes a PEFT folder with a card, the tokenizer and its base's fingerprint: the best adapter by validation (and `last/`), or
    the last one; and the loss of every step.
    """
    from paw.models.adapters import stamp
    from paw.training.module import BEST, CURVE, LAST, TIMES, curve

    c, rows = config.train, len(Rows(inputs["rows"].path))
    if rows < config.devices:
        raise DataError(
            f"{config.data_name}: {rows} usable examples for {config.devices} devices. Use fewer."
        )
    steps = steps_of(c, rows, config.devices)
    if c.val_every is not None and c.val_every > steps:
        raise ConfigError(
            f"train.val_every={c.val_every}: there are {steps} steps, so nothing would be validated. Lower it."
        )
    checkpoint, done = _resumed(c, unfinished, watch)
    plan = Plan(
        inputs["model"].path,
        config.base_name,
        config.trust_remote_code,
        replace(config.runtime, devices=config.devices),
        config.adapter,
        c,
        inputs["rows"].path,
        inputs["val_rows"].path if c.val_every else None,
        config.classify,
        config.classes,
        steps,
        _accumulate(config, Rows(inputs["rows"].path)),
        c.gradient_checkpointing,
        unfinished,
        checkpoint,
        done,
    )
    while not _fits(plan, watch):
        free_memory()  # only now: as long as the error was handled, its traceback held the model
        checkpoint, done = _found(unfinished)
        plan = replace(_smaller(plan, rows, watch), checkpoint=checkpoint, done=done)

    facts: dict[str, Any] = json.loads((unfinished / FACTS).read_text())
    validations = facts.pop("validations")
    kept = BEST if validations else LAST
    shutil.copytree(unfinished / kept, out, dirs_exist_ok=True)
    if validations:
        shutil.copytree(unfinished / LAST, out / LAST)
    for name in (CURVE, TIMES):
        shutil.copyfile(unfinished / name, out / name)
    stamp(
        out,
        inputs["model"].fingerprint,
        made_by="train",
        method=config.adapter.method,
        quantise=config.adapter.quantise,
        **({"classes": config.classes} if config.classify else {}),
    )
    losses = curve(out / CURVE)["loss"]
    tail = losses[-max(1, len(losses) // 10) :]
    result = facts | {"examples": rows, "train_loss": sum(tail) / len(tail)}
    if validations:
        best = min(validations, key=lambda v: v[1])
        result |= {"val_start": validations[0][1], "val_best": best[1], "best_step": best[0]}
    _card(out, config, inputs["model"].path, result)
    return result


def _fits(plan: Plan, watch: Watch) -> bool:
    """Trains; False where memory ran out."""
    try:
        fit(plan, watch)
    except OutOfMemory:
        return False
    return True


def _most(train: TrainConfig, rows: int, devices: int) -> int:
    """Examples of a step in each process: no more micro-batches than that."""
    return max(1, min(train.batch_size, rows // devices))


def _accumulate(config: TrainStage, rows: Rows) -> int:
    """Micro-batches of a step. Small ones cost a GPU its parallelism; a CPU computes as fast on what its caches hold, in a
    fraction of the memory."""
    most = _most(config.train, len(rows), config.devices)
    wanted = config.train.accumulate
    if wanted is None:
        wanted = (
            1
            if config.runtime.device == "cuda"
            else math.ceil(most * float(rows.lengths.mean()) / MICRO)
        )
    return min(wanted, most)


def _resumed(c: TrainConfig, unfinished: Path, watch: Watch) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and the steps it holds.

    Raises:
        ConfigError: for a folder that holds the beginning of another training: what differs is said.
    """
    from paw.training.module import CHECKPOINT

    if c.resume == "never":
        for file in unfinished.iterdir():
            if file.name != BEGUN:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        return None, 0
    if c.resume != "auto":
        given = Path(c.resume).expanduser()
        if not (given / BEGUN).is_file():
            raise ConfigError(
                f"train.resume: {given} holds no unfinished training. Leave it out: paw finds interrupted runs."
            )
        there, here = (json.loads((folder / BEGUN).read_text()) for folder in (given, unfinished))
        if there != here:
            raise ConfigError(
                f"train.resume: {given} is the beginning of another training: {_differ(there, here)}. "
                "Leave train.resume out, or set these as they were."
            )
        if (
            _found(given)[1] > _found(unfinished)[1]
        ):  # not twice: this one may have got further since
            shutil.copytree(
                given, unfinished, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKPOINT)
            )
            with replacing(unfinished / CHECKPOINT) as beside:
                shutil.copyfile(given / CHECKPOINT, beside)
    checkpoint, done = _found(unfinished)
    if done:
        watch.say(
            f"goes on after step {done}, where it was stopped (train.resume=never begins again)"
        )
    return checkpoint, done


def _found(unfinished: Path) -> tuple[Path | None, int]:
    from paw.training.module import CHECKPOINT, held_steps, recover

    recover(unfinished)
    file = unfinished / CHECKPOINT
    return (file, held_steps(file)) if file.exists() else (None, 0)


def _differ(there: Any, here: Any, path: str = "") -> str:
    """The first few values that differ, by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(set(there) | set(here))
        found = [
            _differ(there.get(k), here.get(k), f"{path}.{k}".lstrip("."))
            for k in keys
            if there.get(k) != here.get(k)
        ]
        return ", ".join(filter(None, found[:3]))
    return f"{path.removeprefix('config.')} was {there}, is {here}"


def _smaller(plan: Plan, rows: int, watch: Watch) -> Plan:
    """Half the micro-batch and twice the accumulation; where it is single examples already, activations are recomputed.

    Raises:
        StageError: where that is done already.
    """
    most = _most(plan.train, rows, plan.runtime.devices)
    if plan.accumulate < most:
        more = min(most, 2 * plan.accumulate)
        watch.say(
            f"out of memory: micro-batches of {math.ceil(most / more)} examples instead of {math.ceil(most / plan.accumulate)} "
            f"(train.accumulate={more} starts like that); a step is the same"
        )
        return replace(plan, accumulate=more)
    if not plan.gradient_checkpointing and plan.adapter.method != "prefix_tuning":
        watch.say(
            "out of memory with single examples: activations are recomputed from here (train.gradient_checkpointing=true)"
        )
        return replace(plan, gradient_checkpointing=True)
    raise StageError(
        "train: one example does not fit into memory. Lower train.max_length, choose adapter=qlora, or a device with more of it."
    )


def _card(out: Path, config: TrainStage, model: Path, result: Mapping[str, Any]) -> None:
    """The model card, and the base's tokenizer beside it."""
    for name in TOKENIZER:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    base = config.base_name or model.name
    head = ["---", f"base_model: {base}", "library_name: peft", "tags: [paw]", "---", ""]
    validated = ""
    if "val_best" in result:
        start, best, step = (result[key] for key in ("val_start", "val_best", "best_step"))
        validated = (
            f" Validation loss {start:.4f} at the start, {best:.4f} at step {step}, which this is."
        )
    text = f"""# {config.adapter.method} for {base}

Trained by paw on {config.data_name}: {result["steps"]} steps of {config.devices * config.train.batch_size} examples, learning rate
{config.train.lr:g}, {result["trainable"]:,} parameters, loss {result["train_loss"]:.4f} over the last tenth of the steps.{validated}

    from peft import {"AutoPeftModelForSequenceClassification" if config.classify else "AutoPeftModelForCausalLM"}
"""
    write_text(out / "README.md", "\n".join(head) + text)
