"""The Lightning module and data of a LoRA training."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from paw.config.schema import TrainConfig
from paw.data.encode import Encoded
from paw.errors import StageError
from paw.evaluation.likelihood import token_logprobs


class AnswerLoss(pl.LightningModule):
    """Negative log-likelihood per answer token (nats), minimised with AdamW over the adapter's parameters."""

    def __init__(self, model: Any, train: TrainConfig, pad_id: int) -> None:
        super().__init__()
        self.model, self.config, self.pad_id = model, train, pad_id
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


def loader(rows: list[Encoded], train: TrainConfig, workers: int) -> DataLoader[Encoded]:
    """Shuffled batches; the order is the seed's alone, not what else was drawn."""
    return DataLoader(
        Rows(rows), batch_size=min(train.batch_size, len(rows)), shuffle=True, drop_last=True, num_workers=workers,
        collate_fn=list, generator=torch.Generator().manual_seed(train.seed),
    )  # fmt: skip
