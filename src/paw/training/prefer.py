"""Stage `prefer`: an adapter trained to prefer one answer to another (DPO, arXiv 2305.18290), by TRL."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from paw.config.adapters import AdapterConfig
from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.load import preferences
from paw.errors import ConfigError, need
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch
from paw.training.adapters import Setting, method_named
from paw.training.config import PreferConfig, TrainConfig

STAGE = Stage("prefer", "1", "paw.training.prefer:prefer")


@dataclass
class PreferStage:
    dataset: DatasetConfig
    split: str
    adapter: AdapterConfig
    train: TrainConfig
    prefer: PreferConfig
    runtime: Runtime
    base_name: str | None = transient(None)
    trust_remote_code: bool = transient(False)


def prefer(
    config: PreferStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """Trains on pairs of answers, the better and the worse, with the base itself as the reference.

    Args:
        inputs: `model` and `data`, rows of {prompt, chosen, rejected}.

    Writes a PEFT folder with its base's fingerprint, and the curve of loss and of how often the better answer is preferred.
    """
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from paw.models.adapters import settle, stamp
    from paw.training.module import CURVE

    c, model = config.train, inputs["model"]
    rows = preferences(inputs["data"].path, config.dataset, config.split)
    steps = c.max_steps if c.epochs is None else max(1, round(c.epochs * len(rows) / c.batch_size))
    accumulate = c.accumulate or 1

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                watch.progress(state.global_step, steps, f"loss {float(logs['loss']):.3f}")
                watch.metrics({"train/loss": float(logs["loss"])}, state.global_step)

    torch.manual_seed(c.seed)
    base = load_model(model.path, config.runtime, config.trust_remote_code)
    tokenizer = load_tokenizer(model.path, config.trust_remote_code)
    if tokenizer.eos_token is None:  # TRL ends every answer with it
        tokenizer.eos_token = tokenizer.pad_token
    peft_config = method_named(config.adapter.method).config(
        config.adapter, Setting(base, model.path.name, "CAUSAL_LM", steps, (), ())
    )
    args = DPOConfig(
        output_dir=mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=c.batch_size // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=c.lr,
        lr_scheduler_type=c.schedule,
        warmup_steps=round(c.warmup_ratio * steps),
        weight_decay=c.weight_decay,
        max_grad_norm=c.grad_clip or 1e9,
        max_length=c.max_length,
        beta=config.prefer.beta,
        loss_type=[config.prefer.loss],
        seed=c.seed,
        optim="adamw_torch_fused",
        bf16=config.runtime.precision == "bfloat16",
        fp16=config.runtime.precision == "float16",
        use_cpu=config.runtime.device == "cpu",
        gradient_checkpointing=c.gradient_checkpointing,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    _ = args.device  # finds all GPUs, and would train on each a batch of its own
    args._n_gpu = min(1, args.n_gpu)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        warnings.catch_warnings(),
        redirect_stdout(StringIO()),
    ):  # its own log lines; ours has them in the curve
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model=base,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Told()],
        )
        trainer.train()
    history = [h for h in trainer.state.log_history if "loss" in h]
    adapted = trainer.model
    adapted.peft_config["default"].base_model_name_or_path = config.base_name
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    settle(out)
    stamp(out, model.fingerprint, made_by="prefer", method=config.adapter.method)
    with open(out / CURVE, "w", encoding="utf-8") as f:
        f.writelines(
            json.dumps(
                {
                    "step": h["step"],
                    "loss": h["loss"],
                    "preferred": h["rewards/accuracies"],
                    "margin": h["rewards/margins"],
                }
            )
            + "\n"
            for h in history
        )
    tail = history[-max(1, len(history) // 10) :]
    return {
        "steps": steps,
        "examples": len(rows),
        "train_loss": sum(h["loss"] for h in tail) / len(tail),
        "accuracy": sum(h["rewards/accuracies"] for h in tail) / len(tail),
        "margin": sum(h["rewards/margins"] for h in tail) / len(tail),
    }


def check(devices: int) -> None:
    """
    Raises:
        ConfigError: where TRL is not installed, or several devices are asked for.
    """
    for package in ("trl", "datasets"):
        need(package, "prefer", "task=prefer")
    if devices > 1:
        raise ConfigError(
            f"hardware.devices={devices}: task=prefer trains on one device. Set hardware.devices=1."
        )
