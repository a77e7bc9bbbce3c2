"""The schema of group generator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError
from paw.plugins import modules

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

PAIRINGS = "generator/pairings"  # a file for each way of giving prompts their checkpoints
EXPANDERS, DECODERS = "generator/expanders", "generator/decoders"
# What stands beside a generated adapter, on the same questions.
CONTROLS = {
    "mean": "the mean of the training checkpoints, which needs no prompt",
    "last": "the last of the training checkpoints of one run",
    "nearest": "the training checkpoint whose prompts are most alike",
    "gaussian": "every weight drawn from its own mean and spread over the training checkpoints",
    "shuffled": "generated from the prompts of another task, or of other examples",
    "strings": "generated from random strings",
}


@dataclass
class TokensConfig:
    """How an adapter is cut into tokens. Without a count every tensor has its own tokens, as many
    as it needs; with one all values stand in one row, and must fill count × dim exactly."""

    count: Optional[int] = None
    dim: int = 384
    shard: bool = False  # several blocks of count × dim instead, the last one filled up

    def __post_init__(self) -> None:
        within("generator.tokens.dim", self.dim, 1, 10**6)
        if self.count is not None:
            within("generator.tokens.count", self.count, 1, 10**9)
        elif self.shard:
            raise ConfigError("generator.tokens.shard: needs generator.tokens.count.")


@dataclass
class NetworkConfig:
    """From the vectors of a prompt's examples to tokens."""

    pooling: str = "mean"  # or attention
    expander: str = "factorised"  # a file of that folder
    decoder: str = "hyperconv"  # a file of that folder
    hidden: int = 384
    blocks: int = 3
    kernel: int = 3
    dropout: float = 0.1
    free: int = 32  # of a factorised expander: numbers of each token's own
    # Vectors are centred and whitened over the training prompts, with this ridge: what tells tasks
    # apart is a small part of a sentence encoder's variance. null: as the encoder gives them.
    whiten: Optional[float] = 1e-3
    # tokens are the mean checkpoint plus what is generated, which starts at zero; false: generated
    # whole, through a last normalisation
    residual: bool = True

    def __post_init__(self) -> None:
        one_of("generator.network.pooling", self.pooling, ("mean", "attention"))
        one_of("generator.network.expander", self.expander, tuple(sorted(modules(EXPANDERS))))
        one_of("generator.network.decoder", self.decoder, tuple(sorted(modules(DECODERS))))
        within("generator.network.hidden", self.hidden, 1, 10**5)
        within("generator.network.blocks", self.blocks, 1, 100)
        within("generator.network.kernel", self.kernel, 1, 99)
        within("generator.network.dropout", self.dropout, 0, 0.99)
        within("generator.network.free", self.free, 0, 10**5)
        if self.whiten is not None:
            within("generator.network.whiten", self.whiten, 0, 10**3, open_low=True)
        if self.kernel % 2 == 0:
            raise ConfigError(
                f"generator.network.kernel={self.kernel}: is even, so a token would not be in the "
                "middle of it. Choose an odd one."
            )


@dataclass
class FitConfig:
    """How the network is trained. Losses are in units of the checkpoints' spread, a figure for each
    tensor, so that they are near 1 for the mean checkpoint."""

    lr: float = 1e-4
    weight_decay: float = 0.01
    epochs: int = 100
    batch_size: int = 8
    warmup_ratio: float = 0.0
    grad_clip: float = 1.0
    mse: float = 1.0
    l1: float = 0.1
    delta: float = 0.0  # of ‖B'A' − BA‖², which does not see how BA is factored
    ema: float = 0.99  # of the weights that are kept; 0: the last ones
    seed: int = 0

    def __post_init__(self) -> None:
        within("generator.fit.lr", self.lr, 0, 10, open_low=True)
        within("generator.fit.weight_decay", self.weight_decay, 0, 10)
        within("generator.fit.epochs", self.epochs, 1, 10**6)
        within("generator.fit.batch_size", self.batch_size, 1, 10**6)
        within("generator.fit.warmup_ratio", self.warmup_ratio, 0, 1)
        within("generator.fit.grad_clip", self.grad_clip, 0, 10**6)
        within("generator.fit.ema", self.ema, 0, 0.999999)
        for key in ("mse", "l1", "delta"):
            within(f"generator.fit.{key}", getattr(self, key), 0, 10**6)
        if self.mse + self.l1 + self.delta == 0:
            raise ConfigError("generator.fit: mse, l1 and delta are all 0: nothing is learnt.")


@dataclass
class GeneratorConfig:
    # Prompts: groups of examples that do not overlap.
    samples_per_prompt: int = 4
    test_ratio: float = 0.1  # of the prompts, or of whole tasks; half as many again validate
    most: Optional[int] = None  # prompts of a data set, or of each task; not with pairing=order
    # an example as the encoder reads it; else as dataset.prompt asks it, or its solved form
    text: Optional[str] = None
    labelled: bool = True  # with its answer
    prompts: Optional[str] = transient(None)  # a prepared folder, instead of the data set
    # Checkpoints: of a training run here; of a folder with one data set each (pairing=dataset); or
    # a folder of adapters that exist already.
    pairing: str = "order"
    count: Optional[int] = None  # 50 of those that are made here, all that there are in a folder
    every: int = 8  # steps between those of a run; steps of a branch, and of a task
    warm_steps: int = 150  # of the common start of branches, or of tasks
    tasks: Optional[str] = transient(None)
    checkpoints: Optional[str] = transient(None)
    skip_damaged: bool = False
    tokens: TokensConfig = field(default_factory=TokensConfig)
    encoder: str = "minilm_l6"  # a model by its name, a path, or a hub id
    network: NetworkConfig = field(default_factory=NetworkConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    # What is held out, what the network starts from and which prompts are shown: each seed anew.
    seeds: list[int] = field(default_factory=lambda: [0])
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    dry_run: bool = False  # task=generator_train: check everything, train nothing
    # task=generator_generate: a text with a prompt a line, or one prompt; and who generates
    input: Optional[str] = transient(None)
    prompt: Optional[str] = transient(None)
    path: Optional[str] = transient(None)
    transfer: bool = False  # and move what was generated to the target, as `transfer` says

    def __post_init__(self) -> None:
        within("generator.samples_per_prompt", self.samples_per_prompt, 1, 10**5)
        within("generator.test_ratio", self.test_ratio, 0, 0.45, open_low=True)
        if self.most is not None:
            within("generator.most", self.most, 1, 10**9)
        if self.count is not None:
            within("generator.count", self.count, 3, 10**5)
        within("generator.every", self.every, 1, 10**8)
        within("generator.warm_steps", self.warm_steps, 0, 10**8)
        one_of("generator.pairing", self.pairing, tuple(sorted(modules(PAIRINGS))))
        for control in self.controls:
            one_of("generator.controls", control, tuple(CONTROLS))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"generator.seeds: {self.seeds}. Name different ones, as [0,1,2].")
        if self.prompt is not None and self.input is not None:
            raise ConfigError("generator.prompt and generator.input: give one of them.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("generator.prompt: is empty.")
        if self.fit.delta and self.tokens.count is not None:
            raise ConfigError(
                "generator.fit.delta: needs tensors with tokens of their own. Leave "
                "generator.tokens.count out."
            )
        if self.tasks and self.pairing != "dataset":
            raise ConfigError(
                f"generator.tasks: is read with generator.pairing=dataset, not {self.pairing}."
            )
        if self.pairing == "dataset" and not self.tasks:
            raise ConfigError(
                "generator.pairing=dataset: name the folder with a data set for each task: "
                "generator.tasks=DIR."
            )
