"""The schemas of groups train and prefer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class TrainConfig:
    lr: float = 2e-4
    max_steps: int = 400
    epochs: Optional[float] = None  # passes over the data; decides instead of max_steps
    batch_size: int = 4  # examples per step and device
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    optimizer: str = "adamw"
    max_length: int = 1024  # tokens; longer examples are left out and counted
    seed: int = 0
    # validation on dataset.val_split; the best adapter is kept then, and the last one beside it
    val_every: Optional[int] = None  # steps
    val_limit: int = 512  # examples, the first of the split
    patience: Optional[int] = None  # validations without a better loss after which training stops

    # steps between adapters that are kept beside the last one, in trail/, with the examples that
    # each has seen since the one before
    keep_every: Optional[int] = None

    # How it is computed, not what.
    # micro-batches of a step, doubled out of memory; null: one on a GPU, of 640 tokens on a CPU
    accumulate: Optional[int] = transient(None)
    # examples in one row, each for itself; null: where model and method take it
    packing: Optional[bool] = None
    # turned on by itself where even single examples do not fit
    gradient_checkpointing: bool = transient(False)
    compile: bool = False  # torch.compile; pads, for packed rows never have the same shape twice
    liger: bool = transient(False)  # Liger's kernels: CUDA only
    save_every: int = transient(50)  # steps between checkpoints; with validation, each validation
    # auto: from this training's last checkpoint, if it was stopped; never; or a folder
    resume: str = transient("auto")

    def __post_init__(self) -> None:
        within("train.lr", self.lr, 0, 10, open_low=True)
        within("train.max_steps", self.max_steps, 1, 10**9)
        if self.epochs is not None:
            within("train.epochs", self.epochs, 0, 10**6, open_low=True)
        within("train.batch_size", self.batch_size, 1, 10**6)
        within("train.warmup_ratio", self.warmup_ratio, 0, 1)
        within("train.weight_decay", self.weight_decay, 0, 10)
        within("train.grad_clip", self.grad_clip, 0, 10**6)
        within("train.max_length", self.max_length, 2, 10**7)
        within("train.save_every", self.save_every, 1, 10**9)
        within("train.val_limit", self.val_limit, 1, 10**9)
        one_of("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("train.optimizer", self.optimizer, ("adamw", "adamw_8bit", "paged_adamw_8bit"))
        if self.accumulate is not None:
            within("train.accumulate", self.accumulate, 1, 10**6)
        if self.val_every is not None:
            within("train.val_every", self.val_every, 1, 10**9)
        if self.keep_every is not None:
            within("train.keep_every", self.keep_every, 1, 10**9)
        if self.epochs is None:
            self.check_validated(self.max_steps)
        if self.patience is not None:
            within("train.patience", self.patience, 1, 10**6)
            if self.val_every is None:
                raise ConfigError(
                    "train.patience: early stopping needs validation. Set train.val_every=STEPS."
                )
        if self.compile and self.packing:
            raise ConfigError(
                "train.packing and train.compile: packed rows never have the same shape twice. "
                "Choose one."
            )

    def check_validated(self, steps: int) -> None:
        """
        Raises:
            ConfigError: where so many steps end before the first validation.
        """
        if self.val_every is not None and self.val_every > steps:
            raise ConfigError(
                f"train.val_every={self.val_every}: there are {steps} steps, so nothing would be "
                "validated. Lower it."
            )


@dataclass
class PreferConfig:
    """Direct preference optimisation (arXiv 2305.18290), by TRL. Steps, batches and learning rate
    are those of `train`."""

    beta: float = 0.1  # how far from the base it may go: less is further
    loss: str = "sigmoid"

    def __post_init__(self) -> None:
        within("prefer.beta", self.beta, 0, 10**3, open_low=True)
        one_of("prefer.loss", self.loss, ("sigmoid", "hinge", "ipo"))
