"""Stage `train`: a LoRA adapter of one base on one split."""

from __future__ import annotations

import json
import logging
import os
import signal
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paw.config.schema import AdapterConfig, DatasetConfig, TrainConfig, transient
from paw.data.encode import Encoded, encode
from paw.data.load import examples, listed
from paw.errors import AdapterError, DataError, PawError, StageError, nearest
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch

PRECISION: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
STAGE = Stage("train", "1", "paw.training.stage:train")


@dataclass
class TrainStage:
    dataset: DatasetConfig
    split: str
    adapter: AdapterConfig
    train: TrainConfig
    runtime: Runtime
    devices: int = 1  # a step sees devices × batch_size examples
    lettered: bool = False  # the options stand in the prompt, and the letter is the answer
    base_name: str | None = transient(None)  # written into adapter_config.json
    trust_remote_code: bool = transient(False)


def train(config: TrainStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """Trains LoRA factors on the gold continuation of every example.

    Args:
        inputs: `model` and `data`.

    Writes the adapter as a PEFT folder with its base's fingerprint, and the loss of every step.
    """
    import torch

    from paw.models.adapters import stamp
    from paw.training.module import CURVE, AnswerLoss, loader

    base, c = inputs["model"], config.train
    tokenizer = load_tokenizer(base.path, config.trust_remote_code)
    rows, left_out = _rows(config, inputs["data"].path, tokenizer)
    if left_out:
        watch.say(f"left out: {listed(left_out)}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        # on the CPU: Lightning moves it to its device, in every process
        model = _adapted(load_model(base.path, replace(config.runtime, device="cpu"), config.trust_remote_code), config, base.path)
        model.peft_config["default"].base_model_name_or_path = config.base_name
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _fit(AnswerLoss(model, c, tokenizer.pad_token_id, out, watch), loader(rows, c, config.devices, config.runtime.workers), config, out)

    losses = [json.loads(line)["loss"] for line in (out / CURVE).read_text().splitlines()]
    if len(losses) < c.max_steps:
        raise StageError(f"train: stopped after {len(losses)} of {c.max_steps} steps.")
    if config.devices > 1:  # the processes that trained could not reach the tracker
        for step, loss in enumerate(losses, 1):
            watch.metrics({"train/loss": loss}, step)
    stamp(out, base.fingerprint, made_by="train")
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": c.max_steps,
        "examples": len(rows),
        "left_out": left_out.total(),
        "trainable": trainable,
        "train_loss": sum(tail) / len(tail),
    }


def _rows(config: TrainStage, file: Path, tokenizer: Any) -> tuple[list[Encoded], Counter[str]]:
    """The gold rows as tokens, and why others were left out."""
    left_out: Counter[str] = Counter()
    found = examples(file, config.dataset, config.split, config.lettered, left_out)
    encoded = encode(tokenizer, [(e.contexts[e.gold], e.continuations[e.gold]) for e in found], config.dataset.chat)
    rows = [r for r in encoded if len(r.ids) <= config.train.max_length]
    if len(rows) < config.devices:
        raise DataError(
            f"{config.dataset.name}: {len(encoded) - len(rows)} of {len(encoded)} examples are longer than "
            f"train.max_length={config.train.max_length} tokens, which leaves too few. Raise it."
        )
    if len(rows) < len(encoded):
        left_out[f"more than {config.train.max_length} tokens"] = len(encoded) - len(rows)
    return rows, left_out


def _adapted(model: Any, config: TrainStage, folder: Path) -> Any:
    """The model with fresh LoRA factors on the named modules.

    Raises:
        AdapterError: for a name that no linear module ends with.
    """
    from peft import LoraConfig, get_peft_model

    wanted, c = config.adapter.target_modules, config.adapter
    linears = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    for name in wanted if wanted != ["all-linear"] else []:
        if not any(module == name or module.endswith(f".{name}") for module in linears):
            have = {module.rsplit(".", 1)[-1] for module in linears}
            raise AdapterError(f"adapter.target_modules: {folder.name} has no module {name!r}." + nearest(name, have))
    targets = "all-linear" if wanted == ["all-linear"] else wanted
    return get_peft_model(
        model, LoraConfig(r=c.r, lora_alpha=c.alpha, lora_dropout=c.dropout, task_type="CAUSAL_LM", target_modules=targets)
    )


def _fit(module: Any, data: Any, config: TrainStage, out: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    c, runtime = config.train, config.runtime
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and log intervals
        trainer = pl.Trainer(
            max_steps=c.max_steps,
            accelerator="gpu" if runtime.device == "cuda" else "cpu",
            devices=config.devices,
            strategy=runtime.strategy,
            precision=PRECISION[runtime.precision],
            gradient_clip_val=c.grad_clip or None,
            plugins=[LightningEnvironment()],  # under Slurm too, one task starts its own processes
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(out),
        )
        try:
            trainer.fit(module, data)
        except SystemExit:  # what Lightning makes of Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        except PawError:
            raise
        except Exception as e:
            if "StageError: " in str(e):  # raised in another process, it comes back as text
                raise StageError(str(e).rsplit("StageError: ", 1)[1].strip()) from None
            raise
