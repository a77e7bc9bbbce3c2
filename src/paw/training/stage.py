"""Stage `train`: a LoRA adapter of one base on one split."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.config.schema import AdapterConfig, DatasetConfig, TrainConfig, transient
from paw.data.encode import encode
from paw.data.load import examples
from paw.errors import AdapterError, DataError, StageError
from paw.models.load import Runtime
from paw.store import Input, Stage, Watch

CURVE = "curve.jsonl"
PRECISION: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
STAGE = Stage("train", "1", "paw.training.stage:train")


@dataclass
class TrainStage:
    dataset: DatasetConfig
    split: str
    adapter: AdapterConfig
    train: TrainConfig
    runtime: Runtime
    base_name: str | None = transient(None)  # written into adapter_config.json
    trust_remote_code: bool = transient(False)


def train(config: TrainStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """Trains LoRA factors on the gold continuation of every example.

    Args:
        inputs: `model` and `data`.

    Writes the adapter as a PEFT folder with its base's fingerprint, and the loss of every step.
    """
    import pytorch_lightning as pl
    import torch
    from peft import LoraConfig, get_peft_model

    from paw.models.adapters import stamp
    from paw.models.load import load_model, load_tokenizer
    from paw.training.module import AnswerLoss, loader

    base, c, runtime = inputs["model"], config.train, config.runtime
    tokenizer = load_tokenizer(base.path, config.trust_remote_code)
    found = examples(inputs["data"].path, config.dataset, config.split)
    gold = [(e.contexts[e.gold], e.continuations[e.gold]) for e in found]
    encoded = encode(tokenizer, gold, config.dataset.chat)
    rows = [r for r in encoded if len(r.ids) <= c.max_length]
    if not rows:
        raise DataError(f"{config.dataset.name}: all {len(encoded)} examples are longer than train.max_length={c.max_length} tokens.")
    if len(rows) < len(encoded):
        watch.say(f"{len(encoded) - len(rows)} of {len(encoded)} examples are longer than {c.max_length} tokens and left out")

    names = config.adapter.target_modules
    lora = LoraConfig(
        r=config.adapter.r, lora_alpha=config.adapter.alpha, lora_dropout=config.adapter.dropout, task_type="CAUSAL_LM",
        target_modules="all-linear" if names == ["all-linear"] else names,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and log intervals
        torch.manual_seed(c.seed)
        module = AnswerLoss(
            _adapted(get_peft_model, load_model(base.path, runtime, config.trust_remote_code), lora),
            c,
            tokenizer.pad_token_id,
        )
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
        trainer = pl.Trainer(
            max_steps=c.max_steps, accelerator="gpu" if runtime.device == "cuda" else "cpu", devices=runtime.devices,
            strategy=runtime.strategy, precision=PRECISION[runtime.precision],
            gradient_clip_val=c.grad_clip or None, callbacks=[_watching(watch, c.max_steps)], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(out),
        )  # fmt: skip
        trainer.fit(module, loader(rows, c, runtime.workers))
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.global_step < c.max_steps:
        raise StageError(f"train: stopped after {trainer.global_step} of {c.max_steps} steps.")

    module.model.peft_config["default"].base_model_name_or_path = config.base_name
    module.model.save_pretrained(str(out))
    stamp(out, base.fingerprint, made_by="train", base_name=config.base_name)
    with open(out / CURVE, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(module.losses, 1))
    tail = module.losses[-max(1, len(module.losses) // 10) :]
    return {"steps": c.max_steps, "examples": len(rows), "left_out": len(encoded) - len(rows), "trainable": trainable,
            "train_loss": sum(tail) / len(tail) if tail else None}  # fmt: skip


def _adapted(get_peft_model: Any, model: Any, lora: Any) -> Any:
    try:
        return get_peft_model(model, lora)
    except ValueError:
        have = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "in_features")})
        raise AdapterError(
            f"adapter.target_modules: the model has none of {sorted(lora.target_modules)}; it has {', '.join(have)}."
        ) from None


def _watching(watch: Watch, total: int) -> Any:
    import pytorch_lightning as pl

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.is_global_zero:
                step, loss = trainer.global_step, module.losses[-1]
                watch.progress(step, total, f"loss {loss:.3f}")
                watch.metrics({"train/loss": loss, "train/lr": trainer.optimizers[0].param_groups[0]["lr"]}, step)

    return Watching()
