"""Stage `prefer`: an adapter trained to prefer one answer to another (DPO, arXiv 2305.18290), by
TRL."""

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

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.load import preferences
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch
from paw.training.adapters import AdapterConfig, Setting, method_named
from paw.training.config import PreferConfig, TrainConfig


@dataclass(kw_only=True)
class PreferStage:
    dataset: DatasetConfig
    split: str
    adapter: AdapterConfig
    train: TrainConfig
    prefer: PreferConfig
    runtime: Runtime
    name: str | None = transient(None)  # the base's on the hub, written into adapter_config.json
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class PreferResult:
    steps: int
    examples: int
    # means over the last tenth of the steps
    train_loss: float
    accuracy: float  # how often the chosen answer is preferred
    margin: float  # of the rewards

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, loss {self.train_loss:.3f}, the chosen answer preferred in "
            f"{self.accuracy:.0%} at the end"
        )


STAGE = Stage(
    "prefer",
    "1",
    "paw.training.prefer:prefer",
    config=PreferStage,
    result=PreferResult,
    devices="one",
)


def prefer(
    config: PreferStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> PreferResult:
    """Trains on pairs of answers, the better and the worse, with the base itself as the reference.

    Args:
        inputs: `model` and `data`, rows of {prompt, chosen, rejected}.

    Writes a PEFT folder with its base's fingerprint, and the curve of loss and of how often the
    better answer is preferred.
    """
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOTrainer

    from paw.models.adapters import settle, stamp
    from paw.training.history import CURVE

    c, model = config.train, inputs["model"]
    rows = preferences(inputs["data"].path, config.dataset, config.split)
    steps = c.max_steps if c.epochs is None else max(1, round(c.epochs * len(rows) / c.batch_size))

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
    setting = Setting(model=base, name=model.path.name, task_type="CAUSAL_LM", steps=steps)
    peft_config = method_named(config.adapter.method).config(config.adapter, setting)
    args = _arguments(config, steps)
    _ = args.device  # finds all GPUs, and would train on each a batch of its own
    args._n_gpu = min(1, args.n_gpu)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It prints log lines of its own; the curve has what they say.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
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
    adapted.peft_config["default"].base_model_name_or_path = config.name or str(model.path)
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    settle(out)
    stamp(out, model.fingerprint, made_by="prefer", method=config.adapter.method)
    lines = [{"step": h["step"], "loss": h["loss"]} | _rewards(h) for h in history]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / CURVE).write_text(text, encoding="utf-8")
    tail = lines[-max(1, len(lines) // 10) :]
    means = {key: sum(line[key] for line in tail) / len(tail) for key in lines[0]}
    return PreferResult(
        steps=steps,
        examples=len(rows),
        train_loss=means["loss"],
        accuracy=means["preferred"],
        margin=means["margin"],
    )


def _rewards(entry: Mapping[str, float]) -> dict[str, float]:
    """What TRL's log says of a step's rewards."""
    return {"preferred": entry["rewards/accuracies"], "margin": entry["rewards/margins"]}


def _arguments(config: PreferStage, steps: int) -> Any:
    """TRL's arguments."""
    from trl import DPOConfig

    c, accumulate = config.train, config.train.accumulate or 1
    return DPOConfig(
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
