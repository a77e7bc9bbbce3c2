"""The Lightning module: one optimiser step after another, validated now and then, able to stop and go on anywhere."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from paw.errors import StageError
from paw.models.adapters import WEIGHTS, settle
from paw.store import Watch, write_text
from paw.training.adapters import Method
from paw.training.batches import Micro, Share
from paw.training.config import TrainConfig
from paw.training.objectives import Objective

# Times differ from run to run: they lie in a file that an artifact's content leaves out.
TIMES = "times.csv"
CURVE, BEST, LAST, CHECKPOINT = "curve.jsonl", "best", "last", "last.ckpt"
ADAPTER = "default"  # PEFT's name for the one there is


@dataclass
class History:
    """What happened until now; a checkpoint carries it."""

    losses: list[float] = field(
        default_factory=list
    )  # of each step: the mean over all that it counts, in all processes
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss)
    seconds: list[float] = field(default_factory=list)  # of each step
    tokens: list[int] = field(default_factory=list)
    skipped: int = 0  # steps that float16's scaler left out, because their gradients overflowed

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the best validation."""
        return min(self.validations, key=lambda v: v[1])

    def stale(self) -> int:
        """Validations since the best one."""
        return len(self.validations) - 1 - self.validations.index(self.best)

    def write(self, file: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"step": i, "loss": loss} for i, loss in enumerate(self.losses, 1)
        ]
        rows += [{"step": step, "val_loss": loss} for step, loss in self.validations]
        write_text(
            file, "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["step"]))
        )
        times = [
            f"{i},{n},{s:.4f}\n"
            for i, (n, s) in enumerate(zip(self.tokens, self.seconds, strict=True), 1)
        ]
        write_text(file.with_name(TIMES), "step,tokens,seconds\n" + "".join(times))


class Training(pl.LightningModule):
    """AdamW over an adapter's parameters.

    Everything that Lightning's own loops would remember is left out of checkpoints: which examples a step sees and what its
    dropout draws follow from its number (`batches`, `training_step`), so the number is all there is to go on from. That holds
    after a micro-batch was halved, too.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        objective: Objective,
        train: TrainConfig,
        steps: int,
        share: Share,
        folder: Path,
        watch: Watch,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the adapter only
        self.model, self.method, self.objective, self.config, self.steps = (
            model,
            method,
            objective,
            train,
            steps,
        )
        self.share, self.folder, self.watch = share, folder, watch
        self.history = History()
        self.counted = 1  # what all validation rows weigh
        self.adapter_keys = {f"model.{name}" for name in _adapter_names(model)}
        self._sum = self._validation = torch.zeros(())
        self._scale = 0.0  # of float16's gradients
        self._began = time.perf_counter()

    # ---- one step

    def on_train_start(self) -> None:
        self.model.train()  # Lightning keeps the mode it finds, and a loaded model is in eval mode
        still = [
            n
            for n, m in self.model.named_modules()
            if isinstance(m, torch.nn.Dropout) and m.p > 0 and not m.training
        ]
        if still:
            raise StageError(
                f"train: the dropout of {still[0]} would not act. This is a bug of paw: please report it."
            )
        self._scale = self._scaler.get_scale() if self._scaler else 0.0
        self._stop_if_stale()  # a training may have been killed at the very validation that ended it
        self._began = time.perf_counter()

    def training_step(self, batch: Micro, index: int) -> torch.Tensor:
        torch.manual_seed(
            hash((self.config.seed, batch.step, index % self.share.accumulate, self.share.rank))
            & 0x7FFFFFFF
        )
        loss = self.objective.total(self.model, batch.rows) * batch.weight
        self._sum = self._sum.to(loss.device) + loss.detach() / self.share.accumulate
        extra = self.method.penalty(self.model)
        return loss if extra is None else loss + extra

    def on_train_batch_end(self, outputs: Any, batch: Micro, index: int) -> None:
        if (index + 1) % self.share.accumulate:
            return
        step, loss = (
            batch.step + 1,
            float(self.trainer.strategy.reduce(self._sum, reduce_op="mean")),
        )
        self._sum = torch.zeros(())
        if not math.isfinite(loss):
            raise StageError(
                f"train: the loss is not finite at step {step}. Lower train.lr, or use hardware.precision=float32."
            )
        self.method.after_step(self.model, step)
        if self._scaler:
            before, self._scale = self._scale, self._scaler.get_scale()
            self.history.skipped += self._scale < before  # it falls after an overflow
        now = time.perf_counter()
        self.history.losses.append(loss)
        self.history.seconds.append(now - self._began)
        self.history.tokens.append(batch.tokens)
        self._began = now
        if self.trainer.is_global_zero:
            self.watch.progress(step, self.steps, f"loss {loss:.3f}")
            self.watch.metrics(
                {"train/loss": loss, "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]},
                step,
            )
        if (
            self.config.val_every is None
            and step % self.config.save_every == 0
            and step < self.steps
        ):
            self.save()

    # ---- validation

    def validation_step(self, batch: Micro, index: int) -> None:
        loss = self.objective.total(self.model, batch.rows) * batch.weight
        self._validation = self._validation.to(loss.device) + loss

    def on_validation_epoch_end(self) -> None:
        summed = self.trainer.strategy.reduce(self._validation.to(self.device), reduce_op="sum")
        loss, step = float(summed) / self.counted, self.history.step
        self._validation = torch.zeros(())
        self.history.validations.append((step, loss))
        if self.trainer.is_global_zero:
            self.watch.metrics({"val/loss": loss}, step)
        if self.history.best[0] == step:
            self.write_adapter(self.folder / BEST)
        if step:
            self.save()
        self._stop_if_stale()
        self._began = time.perf_counter()  # a step's seconds are its own

    def _stop_if_stale(self) -> None:
        if self.config.patience is not None and self.history.stale() >= self.config.patience:
            self.trainer.should_stop = True

    # ---- what is kept

    def save(self) -> None:
        """A checkpoint that takes the place of the last one at once, or not at all."""
        target = self.folder / CHECKPOINT
        beside = target.with_name(f"{target.name}.new")
        self.trainer.save_checkpoint(beside)
        if self.trainer.is_global_zero:
            _exchange(beside, target)
        self.trainer.strategy.barrier()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {
            k: v for k, v in checkpoint["state_dict"].items() if k in self.adapter_keys
        }
        checkpoint["paw"] = {"history": vars(self.history), "method": self.method.state(self.model)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("loops", None)
        self.history = History(**checkpoint["paw"]["history"])
        state = checkpoint["paw"]["method"]
        if state is not None:
            self.method.restore(self.model, state)

    def write_adapter(self, folder: Path) -> None:
        """The adapter as a PEFT folder, gathered from all processes and written by the first."""
        state = {
            k.removeprefix("model."): v
            for k, v in self.trainer.strategy.lightning_module_state_dict().items()
            if k in self.adapter_keys
        }
        if not self.trainer.is_global_zero:
            return
        config = self.model.peft_config[ADAPTER]
        pattern = getattr(config, "rank_pattern", None)
        beside = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        if self._sharded:
            _save_sharded(config, state, beside)
        else:
            prompt = (
                {} if config.is_prompt_learning else {"state_dict": state}
            )  # PEFT reads virtual tokens from the model
            self.model.save_pretrained(str(beside), save_embedding_layers=False, **prompt)
        if (
            pattern is not None
        ):  # PEFT rewrites AdaLoRA's ranks for the file, and would go on with that
            config.rank_pattern = pattern
        settle(beside)
        _exchange(beside, folder)

    # ---- Lightning's questions

    @property
    def _scaler(self) -> Any:
        """What scales float16's gradients; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def _sharded(self) -> bool:
        return isinstance(self.trainer.strategy, pl.strategies.FSDPStrategy)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips the norm over all parameters, which Lightning refuses with a fused optimizer in any 16-bit precision.

        It is right there: bfloat16 has no scaled gradients, and of float16's the scaler has removed the scale before this
        is called, since `configure_optimizers` takes no fused optimizer then. DeepSpeed clips by its own configuration.
        """
        if not gradient_clip_val or isinstance(
            self.trainer.strategy, pl.strategies.DeepSpeedStrategy
        ):
            return
        if self._sharded:  # the norm is over all shards
            sharded: Any = self.trainer.strategy.model
            sharded.clip_grad_norm_(gradient_clip_val)
            return
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.grad is not None], gradient_clip_val
        )

    def transfer_batch_to_device(
        self, batch: Micro, device: torch.device, dataloader_idx: int
    ) -> Micro:
        return batch  # lists of token ids; they become tensors where the model is

    def configure_optimizers(self) -> Any:
        c = self.config
        # A fused optimizer takes the scale (float16) off its gradients itself: too late for clipping, which comes before it.
        optimizer = _optimizer(
            c, [p for p in self.model.parameters() if p.requires_grad], fused=not self._scaler
        )
        warmup = round(c.warmup_ratio * self.steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            left = 1 - (step - warmup) / max(1, self.steps - warmup)
            return {
                "constant": 1.0,
                "linear": left,
                "cosine": 0.5 * (1 - math.cos(math.pi * left)),
            }[c.schedule]

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _save_sharded(config: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """An adapter under the names that PEFT saves it by. PEFT looks its tensors up by the names of the model's modules,
    which wrapping them in shards has changed: it would write an empty file."""
    folder.mkdir()
    tensors = {
        re.sub(rf"\.(modules_to_save\.)?{ADAPTER}\b", "", name): t.contiguous().cpu()
        for name, t in state.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ready = copy(config)
    ready.inference_mode = True
    ready.save_pretrained(str(folder))


def _exchange(new: Path, target: Path) -> None:
    """A file takes another's place at once. A folder, which a sharded strategy writes, cannot: for a moment the old one lies beside."""
    if not target.is_dir():
        os.replace(new, target)
        return
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old)


def recover(folder: Path) -> None:
    """What a kill left between the two renames of an exchange."""
    for old in folder.glob("*.old"):
        if not old.with_suffix("").exists():
            os.rename(old, old.with_suffix(""))


def _optimizer(
    c: TrainConfig, parameters: list[torch.nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    if c.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=c.lr, weight_decay=c.weight_decay, fused=fused)
    optim: Any = import_module("bitsandbytes.optim")
    kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[c.optimizer]
    found: torch.optim.Optimizer = kind(parameters, lr=c.lr, weight_decay=c.weight_decay)
    return found


def _adapter_names(model: Any) -> set[str]:
    """Parameters that PEFT added, the trained ones and those it keeps beside them (AdaLoRA's ranks)."""
    return {n for n, p in model.named_parameters() if p.requires_grad or "ranknum" in n}


def curve(file: Path) -> Mapping[str, list[float]]:
    """The losses that a finished training left."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {key: [r[key] for r in rows if key in r] for key in ("loss", "val_loss")}


def held_steps(file: Path) -> int:
    """The step that a checkpoint holds."""
    return len(
        torch.load(_main_file(file), map_location="cpu", weights_only=True)["paw"]["history"][
            "losses"
        ]
    )


def _main_file(file: Path) -> Path:
    """Sharded strategies write folders, with one file for what is not sharded."""
    return next(file.rglob("mp_rank_00_model_states.pt")) if file.is_dir() else file
