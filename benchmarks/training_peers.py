"""Two peers that train LoRA, each in a process of its own:

    python training_peers.py trl|hf SPEC.json OUT.json

benchmarks/training.py starts them. TRL's settings are the fastest that were found for it on two
cores: single examples accumulated where a step must see the same examples as the others, rows of
512 tokens where it may pack; no gradient checkpointing, which it turns on by default, and bfloat16
(its default, on CPUs too) only where it is asked for.

SPEC: model, rows [[ids, start], ...], batch, steps, lr, r, alpha, dropout, seed, device (cpu or
cuda), dtype. Optional: trl_mode ("same_batches" | "packed"), micro_batch (examples per forward),
row_len (packed only), attn, overrides (any further SFTConfig / TrainingArguments arguments).
"""

import os

# Read by the hub's client when it loads.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

Spec = dict[str, Any]


class Meter(TrainerCallback):
    """Per-step wall time, loss and token counts."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.label_tokens: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for series in (self.losses, self.tokens, self.label_tokens):
            series.append(0)
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.start)

    @staticmethod
    def _now() -> float:
        """When all that was asked of a GPU is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def see(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        mask = inputs.get("attention_mask")  # none when padding-free: every token is then real
        self.tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self.label_tokens[-1] += int(
            (inputs["labels"][:, 1:] != -100).sum()
        )  # position 0 is never predicted
        self.losses[-1] += float(
            loss
        )  # a micro-batch's share: already divided by the whole step's label tokens


def measured(kind: type[Trainer], meter: Meter) -> type[Trainer]:
    """The trainer class with its full-precision step loss handed to the meter."""

    class Measured(kind):  # type: ignore[misc, valid-type]
        def training_step(
            self, model: Any, inputs: Any, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            seen = {key: inputs.get(key) for key in ("input_ids", "labels", "attention_mask")}
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            meter.see(seen, loss)
            return loss

    return Measured


def common(spec: Spec, micro: int) -> dict[str, Any]:
    """Arguments both trainers share."""
    assert spec["batch"] % micro == 0, "micro_batch must divide batch"
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec["batch"] // micro,
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,  # 0 skips clipping and its norm
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "seed": spec["seed"],
        "use_cpu": spec["device"] == "cpu",
        "bf16": spec["dtype"] == "bfloat16",  # SFTConfig turns it on when unset, on CPU too
        "gradient_checkpointing": False,  # SFTConfig turns it on
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": spec["device"] == "cuda",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def parts(spec: Spec) -> tuple[Any, Any, LoraConfig, Dataset]:
    # Frozen weights in the precision asked for, as paw has them; PEFT keeps its factors in float32,
    # and autocast does the rest.
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=dtype, attn_implementation=spec.get("attn", "sdpa")
    )
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lora = LoraConfig(
        r=spec["r"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    rows = spec["rows"][: spec["batch"] * spec["steps"]]
    assert len(rows) == spec["batch"] * spec["steps"], "too few rows for the steps"
    data = Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in rows],
            "labels": [[-100] * start + ids[start:] for ids, start in rows],
        }
    )
    return model, tokenizer, lora, data


def run_hf(spec: Spec, meter: Meter) -> tuple[Trainer, dict[str, Any]]:
    """The plain Trainer + PEFT: the whole batch padded to its longest example, one forward."""
    model, tokenizer, lora, data = parts(spec)
    chosen = common(spec, spec.get("micro_batch", spec["batch"])) | spec.get("overrides", {})
    torch.manual_seed(spec["seed"])
    trainer = measured(Trainer, meter)(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**chosen),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[meter],
    )
    return trainer, chosen


def run_trl(spec: Spec, meter: Meter) -> tuple[Trainer, dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, lora, data = parts(spec)
    if spec.get("trl_mode", "same_batches") == "packed":
        step_tokens = sum(map(len, data["input_ids"])) / spec["steps"]
        length = spec.get("row_len", round(step_tokens))
        # Shorter rows are accumulated up to about the same tokens per optimiser step.
        accumulate = max(1, round(step_tokens / length))
        extra: dict[str, Any] = {
            "packing": True,
            # whole examples; "wrapped" cuts them and attends across them
            "packing_strategy": "bfd",
            "max_length": length,
            "gradient_accumulation_steps": accumulate,
        }
        micro = 1
    else:
        # One example per forward, accumulated to the batch: nothing is padded, the mask drops out
        # (so SDPA takes its causal path), and TRL still divides by the label tokens of the whole
        # step, so the loss is the batch's own. TRL scores every position against the vocabulary on
        # CPU, so padding is what costs it most there.
        micro = spec.get("micro_batch", 1)
        extra = {"max_length": None}
    chosen = common(spec, micro) | extra | spec.get("overrides", {})
    trainer = measured(SFTTrainer, meter)(
        model=model,
        args=SFTConfig(**chosen),  # its __init__ seeds torch right before get_peft_model
        train_dataset=data,  # "labels" given: completion_only_loss has nothing left to do
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[meter],
    )
    return trainer, chosen


def main() -> None:
    which, spec_path, out_path = sys.argv[1:]
    spec: Spec = json.loads(Path(spec_path).read_text())
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    meter = Meter()
    trainer, chosen = {"hf": run_hf, "trl": run_trl}[which](spec, meter)
    trainer.train()
    gpu = torch.cuda.max_memory_allocated() / 2**20 if spec["device"] == "cuda" else None
    out = {
        "losses": meter.losses,
        "seconds": meter.seconds,
        "tokens": meter.tokens,
        "gpu_mib": gpu,
        "settings": chosen,
    }
    Path(out_path).write_text(json.dumps(out, indent=1, default=str))


if __name__ == "__main__":
    main()
