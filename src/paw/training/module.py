"""The Lightning module and data of a LoRA training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from paw.config.schema import TrainConfig
from paw.data.encode import Encoded
from paw.errors import StageError
from paw.evaluation.likelihood import token_logprobs
from paw.models.adapters import settle
from paw.store import Watch

CURVE = "curve.jsonl"


class AnswerLoss(pl.LightningModule):
    """Negative log-likelihood per answer token (nats), minimised with AdamW over the adapter's parameters.

    The process of rank 0 writes the adapter and the curve to `out` at the end: with several processes the one that
    started them sees nothing else of the training.
    """

    def __init__(self, model: Any, train: TrainConfig, pad_id: int, out: Path, watch: Watch) -> None:
        super().__init__()
        self.model, self.config, self.pad_id, self.out, self.watch = model, train, pad_id, out, watch
        self.losses: list[float] = []

    def on_train_start(self) -> None:
        self.model.train()  # Lightning keeps the mode it finds, and a loaded model is in eval mode

    def training_step(self, batch: list[Encoded], index: int) -> torch.Tensor:
        logprobs, mask = token_logprobs(self.model, batch, self.pad_id)
        loss = -logprobs.sum() / mask.sum()
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise StageError(
                f"train: the loss is not finite at step {len(self.losses)}. Lower train.lr, or use hardware.precision=float32."
            )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_global_zero:
            step, loss = self.trainer.global_step, self.losses[-1]
            self.watch.progress(step, self.config.max_steps, f"loss {loss:.3f}")
            self.watch.metrics({"train/loss": loss, "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}, step)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(str(self.out), save_embedding_layers=False)
            settle(self.out)
            with open(self.out / CURVE, "w", encoding="utf-8") as f:
                f.writelines(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(self.losses, 1))

    def transfer_batch_to_device(self, batch: list[Encoded], device: torch.device, dataloader_idx: int) -> list[Encoded]:
        return batch  # lists of token ids; they become tensors where the model is

    def configure_optimizers(self) -> Any:
        c = self.config
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=c.lr, weight_decay=c.weight_decay)
        warmup = round(c.warmup_ratio * c.max_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            left = 1 - (step - warmup) / max(1, c.max_steps - warmup)
            return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[c.schedule]

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(Dataset[Encoded]):
    def __init__(self, rows: list[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class Shuffled(Sampler[int]):
    """A new order every epoch, from the seed alone; each process takes every world-th row of it."""

    def __init__(self, count: int, seed: int, devices: int) -> None:
        self.count, self.seed, self.devices, self.epoch = count, seed, devices, 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.devices

    def __iter__(self) -> Iterator[int]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return iter(order[rank : len(self) * self.devices : self.devices])


def loader(rows: list[Encoded], train: TrainConfig, devices: int, workers: int) -> DataLoader[Encoded]:
    """Whole batches only, so that every step weighs the same; fewer rows than a batch make one smaller batch."""
    sampler = Shuffled(len(rows), train.seed, devices)
    size = min(train.batch_size, len(sampler))
    return DataLoader(Rows(rows), batch_size=size, sampler=sampler, drop_last=True, num_workers=workers, collate_fn=list)
