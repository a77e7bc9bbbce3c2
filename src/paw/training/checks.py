"""What can be known to be wrong with a training before its model loads."""

from __future__ import annotations

import json
from pathlib import Path

from paw.errors import ConfigError, need
from paw.models.load import Runtime
from paw.models.tensors import linear_shapes
from paw.store import BEGUN
from paw.training.adapters import AdapterConfig, check_targets, method_named
from paw.training.config import TrainConfig


def check_adapter(adapter: AdapterConfig, folder: Path) -> str:
    """What will be trained of the model in a folder, in words.

    Raises:
        AdapterError: for modules that the model has not.
        ConfigError: for packages that are not installed.
    """
    if adapter.quantise != "none":
        need("bitsandbytes", "quantise", f"adapter.quantise={adapter.quantise}")
    wanted = [n for n in getattr(adapter, "target_modules", None) or [] if n != "all-linear"]
    linears = [name for name in linear_shapes(folder) if "embed" not in name]
    check_targets(wanted, linears, folder.name)
    return f"{adapter.method} on {', '.join(wanted) or 'its own choice of modules'}"


def check_training(train: TrainConfig, adapter: AdapterConfig, runtime: Runtime) -> None:
    """
    Raises:
        ConfigError: for what the method, the device or the strategy does not take, packages that
            are not installed, and files that are not there.
    """
    check_resume(train.resume)
    method = method_named(adapter.method)
    if train.gradient_checkpointing and not method.recomputes:
        raise ConfigError(
            f"train.gradient_checkpointing: {adapter.method} keeps a cache, which recomputing "
            "cannot. Leave it out."
        )
    if train.optimizer != "adamw":
        need("bitsandbytes", "quantise", f"train.optimizer={train.optimizer}")
    if train.liger:
        need("liger_kernel", "liger", "train.liger")
        if runtime.device != "cuda":
            raise ConfigError("train.liger: its kernels run on CUDA only. Set train.liger=false.")
    if runtime.strategy == "deepspeed":
        if runtime.deepspeed is not None:
            _check_json("hardware.deepspeed", Path(runtime.deepspeed))
        need("deepspeed", "deepspeed", "hardware.strategy=deepspeed")
        if runtime.device != "cuda":
            raise ConfigError(
                "hardware.strategy=deepspeed: needs GPUs, and there are none. Choose ddp or fsdp."
            )
    if runtime.strategy == "fsdp" and (not method.shards or adapter.quantise != "none"):
        raise ConfigError(
            "hardware.strategy=fsdp: shards what adapter=lora and ia3 train on an unquantised base "
            "only. Choose ddp."
        )


def check_resume(resume: str) -> Path | None:
    """The folder to go on from; None where paw finds it itself (auto), or begins anew (never).

    Raises:
        ConfigError: where the folder holds no unfinished training.
    """
    if resume in ("auto", "never"):
        return None
    given = Path(resume).expanduser()
    if not (given / BEGUN).is_file():
        raise ConfigError(
            f"train.resume: {given} holds no unfinished training. Leave it out: paw finds "
            "interrupted runs."
        )
    return given


def check_prefer(train: TrainConfig, adapter: AdapterConfig, devices: int) -> None:
    """TRL trains there, and not all that `train` offers is its.

    Raises:
        ConfigError: for what it does not take, or where it is not installed.
    """
    if adapter.method != "lora" or adapter.quantise != "none":
        raise ConfigError("task=prefer: trains LoRA on a base in full precision. Use adapter=lora.")
    for key in ("val_every", "compile", "liger", "packing"):
        if getattr(train, key):
            raise ConfigError(f"train.{key}: task=prefer does not take it. Leave it out.")
    if train.optimizer != "adamw" or train.resume != "auto":
        raise ConfigError(
            "task=prefer: takes train.optimizer=adamw, and does not resume. Leave train.optimizer "
            "and train.resume out."
        )
    if train.batch_size % (train.accumulate or 1):
        raise ConfigError(
            f"train.accumulate={train.accumulate}: must divide "
            f"train.batch_size={train.batch_size} in task=prefer."
        )
    if devices > 1:
        raise ConfigError(
            f"hardware.devices={devices}: task=prefer trains on one device. Set hardware.devices=1."
        )
    for package in ("trl", "datasets"):
        need(package, "prefer", "task=prefer")


def _check_json(key: str, file: Path) -> None:
    try:
        if not isinstance(json.loads(file.read_text()), dict):
            raise ConfigError(f"{key}: {file} holds no object with keys.")
    except OSError as e:
        raise ConfigError(
            f"{key}: {file} cannot be read ({e.strerror}). Give a JSON file."
        ) from None
    except ValueError as e:
        raise ConfigError(f"{key}: {file} is not JSON ({e}).") from None
