"""The schema of every group in conf/; the yaml files only choose values.

A field marked `transient` changes how fast or where a stage runs, not what it makes: it is left out of fingerprints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from paw.config.adapters import ADAPTER_SCHEMAS, AdapterConfig
from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError
from paw.paths import PACKAGE, conf_dir, embedded

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

STAGES = (
    "encode",
    "train",
    "prefer",
    "evaluate",
    "match",
    "calibrate",
    "transfer",
    "spoil",
    "merge",
    "compress",
)
MODES = ("likelihood", "letter", "generate", "classify")


@dataclass
class PackageConfig:
    """A model file that a Python package carries, perhaps in parts."""

    files: list[str] = field(default_factory=list)  # relative to site-packages, in order
    sha256: str = MISSING  # of the parts joined
    install: str = MISSING  # the command that brings it


@dataclass
class ModelConfig:
    """A base model. Found in this order: path, models_dir (by name or hub id), package, the hub's cache, the hub."""

    name: str = MISSING
    path: Optional[str] = None  # a folder in the hub's layout, or a .gguf file
    hub: Optional[str] = None  # owner/name
    revision: Optional[str] = None
    package: Optional[PackageConfig] = None
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Questions with choices, or texts with an answer. `kind` names a file in paw/data/kinds."""

    name: str = transient(MISSING)
    kind: str = "question"
    prompt: str = "Question: {question}\nAnswer:"
    letter_prompt: str = "Question: {question}\n{options}\nAnswer:"  # where the options stand in the prompt under letters
    chat: bool = False  # wrap the prompt in the model's own chat template
    mode: str = transient("likelihood")  # how it is evaluated, unless evaluate.mode says otherwise
    stop: list[str] = field(
        default_factory=lambda: ["Question:", "</s>", "<|im_end|>"]
    )  # where a generated answer ends
    f1: Optional[int] = None  # the choice whose F1 is reported, counted from 0
    bad_rows: str = "refuse"  # or skip: rows that cannot be scored are left out and counted
    # where the rows come from is known by their content
    path: Optional[str] = transient(
        None
    )  # a folder of <split>.jsonl[.gz]; else paths.data_dir/<name>; else the hub
    hub: Optional[str] = transient(None)
    subset: Optional[str] = transient(None)
    revision: Optional[str] = transient(None)
    calibration: Optional[str] = transient(
        None
    )  # unlabelled text for transfer; else the train split's questions
    train_split: str = transient("train")
    val_split: Optional[str] = transient(None)  # for train.val_every
    eval_split: str = transient("test")
    classes: list[str] = field(
        default_factory=list
    )  # names of the labels, in their order, where rows have none

    def __post_init__(self) -> None:
        kinds = sorted(
            p.stem for p in (PACKAGE / "data" / "kinds").glob("*.py") if p.stem != "__init__"
        )
        one_of("dataset.kind", self.kind, tuple(kinds))
        one_of("dataset.mode", self.mode, MODES)
        one_of("dataset.bad_rows", self.bad_rows, ("refuse", "skip"))
        for key, text in (("prompt", self.prompt), ("letter_prompt", self.letter_prompt)):
            try:
                names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
            except ValueError as e:
                raise ConfigError(
                    f"dataset.{key}: {e}. Write fields as {{question}}, and a brace itself as {{{{ or }}}}."
                ) from None
            if not all(re.match(r"[A-Za-z_]", name) for name in names):
                raise ConfigError(
                    f"dataset.{key}: a field has no name. Write fields as {{question}}."
                )
        if any(not text for text in self.stop):
            raise ConfigError("dataset.stop: an empty text would end every answer at once.")


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
    # how it is computed, not what
    accumulate: Optional[int] = transient(
        None
    )  # micro-batches of a step; null: one on a GPU, of 640 tokens on a CPU; doubled out of memory
    packing: Optional[bool] = (
        None  # examples in one row, each for itself; null: where model and method take it
    )
    gradient_checkpointing: bool = transient(
        False
    )  # turned on by itself where even single examples do not fit
    compile: bool = False  # torch.compile; pads, for packed rows never have the same shape twice
    liger: bool = transient(False)  # Liger's kernels: CUDA only
    save_every: int = transient(50)  # steps between checkpoints; with validation, each validation
    resume: str = transient(
        "auto"
    )  # auto: from this training's last checkpoint, if it was stopped; never; or a folder

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
            if self.epochs is None and self.val_every > self.max_steps:
                raise ConfigError(
                    f"train.val_every={self.val_every}: there are {self.max_steps} steps, so nothing would be validated."
                )
        if self.patience is not None:
            within("train.patience", self.patience, 1, 10**6)
            if self.val_every is None:
                raise ConfigError(
                    "train.patience: early stopping needs validation. Set train.val_every=STEPS."
                )
        if self.compile and self.packing:
            raise ConfigError(
                "train.packing and train.compile: packed rows never have the same shape twice. Choose one."
            )


@dataclass
class EvaluateConfig:
    """How questions are put and answered.

    `likelihood` compares the choices' log-likelihoods; `letter` those of the options' letters; `generate` has the model
    write: the letter where there are choices, else a worked answer whose number counts; `classify` puts a trained head on
    the model, one output a class.
    """

    mode: str = "likelihood"
    num_fewshot: int = 0  # solved questions before each, the same for all
    fewshot_split: Optional[str] = transient(None)  # where they are drawn; else the train split
    sample_ratio: float = 1.0  # a seeded sample of the split
    limit: Optional[int] = (
        None  # at most so many of it, drawn by the seed (the harness takes the first)
    )
    split: Optional[str] = transient(None)  # instead of the data set's own
    seed: int = 0
    max_new_tokens: int = 256  # of a generated answer
    batch_tokens: Optional[int] = transient(None)  # in a batch; else by device
    records: str = transient("jsonl")  # or parquet: the per-example results in the run folder

    def __post_init__(self) -> None:
        one_of("evaluate.mode", self.mode, MODES)
        one_of("evaluate.records", self.records, ("jsonl", "parquet"))
        within("evaluate.sample_ratio", self.sample_ratio, 0, 1, open_low=True)
        within("evaluate.num_fewshot", self.num_fewshot, 0, 1000)
        within("evaluate.max_new_tokens", self.max_new_tokens, 1, 10**6)
        if self.batch_tokens is not None:
            within("evaluate.batch_tokens", self.batch_tokens, 1, 10**9)
        if self.limit is not None:
            within("evaluate.limit", self.limit, 1, 10**9)

    def lettered(self, kind: str) -> bool:
        """Whether the options stand in the prompt; texts have none."""
        return self.mode in ("letter", "generate") and kind not in ("text", "chat")

    def form(self, kind: str) -> str:
        """What a row becomes: its choices, their letters, or a class."""
        return (
            "letter"
            if self.lettered(kind)
            else "classify"
            if self.mode == "classify"
            else "likelihood"
        )


EVIDENCE = ("weights", "embeddings", "text", "models")
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class TransferConfig:
    """What every method shares; a method's own parameters stand in a subclass."""

    method: str = MISSING
    # What the method looks at: both models' weights; also their embeddings of shared tokens; moments of both's activations
    # on a text; or the running models themselves.
    evidence: str = "text"
    layers: str = "proportional"
    spread: bool = (
        False  # the layers that a matching leaves out join its nearest: added up, or divided
    )
    gain: str = "activation"  # none, weight, activation, or a number
    basis: Optional[int] = (
        None  # singular vectors kept a side; else 320, and at most half of the smallest dimension
    )
    # What the gate looks at. raw: overlap of the mapped source subspaces with the target's; excess: that above chance;
    # weights: the source systems' measure, ‖U_sᵀU_t‖²/k² of the weights as they are, whose chance is 1 in the larger width.
    similarity: str = "raw"
    similarity_threshold: float = 1e-4
    modules: list[str] = field(
        default_factory=list
    )  # roles that are transferred, such as [q_proj,v_proj]; empty: all
    keep_top: float = (
        1.0  # the share of the target's layers, the most similar ones, that are transferred
    )
    positions: int = 16384  # calibration positions
    calibration: Optional[str] = transient(
        None
    )  # a text file, a document a line; else the data set's own text
    batch_size: int = transient(32)  # calibration texts at a time
    memory_gb: float = transient(
        8.0
    )  # for moments: kept if they fit, else streamed in groups of layers that do
    workers: int = transient(1)  # modules read and decomposed ahead, each in a thread
    # Other methods shown beside, a list; or `standard`, the placebos that this method can have.
    controls: Any = field(default_factory=list, metadata={"transient": True})
    draws: int = transient(5)  # of each placebo that is drawn by chance

    def __post_init__(self) -> None:
        one_of("transfer.evidence", self.evidence, EVIDENCE)
        one_of("transfer.layers", self.layers, ("proportional", "index", "cka", "similarity"))
        one_of("transfer.similarity", self.similarity, ("raw", "excess", "weights"))
        for role in self.modules:
            one_of("transfer.modules", role, ROLES)
        if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", self.gain):
            one_of("transfer.gain", self.gain, ("none", "weight", "activation", "a number"))
        if self.basis is not None:
            within("transfer.basis", self.basis, 1, 10**6)
        within("transfer.positions", self.positions, 16, 10**9)
        within("transfer.batch_size", self.batch_size, 1, 10**6)
        within("transfer.memory_gb", self.memory_gb, 0, 10**6, open_low=True)
        within("transfer.similarity_threshold", self.similarity_threshold, -1, 1)
        within("transfer.keep_top", self.keep_top, 0, 1, open_low=True)
        within("transfer.workers", self.workers, 1, 64)
        within("transfer.draws", self.draws, 1, 1000)
        if isinstance(self.controls, str):
            one_of("transfer.controls", self.controls, ("standard", "a list as [a,b]"))
            self.controls = self.placebos()
        if not isinstance(self.controls, list) or not all(
            isinstance(c, str) for c in self.controls
        ):
            raise ConfigError("transfer.controls: give a list of methods as [a,b], or standard.")

    def placebos(self) -> list[str]:
        """`standard`: what must not do what this method does."""
        pairs_text = self.evidence in ("text", "models")
        return [
            "random",
            *["shuffled"] * pairs_text,
            "negated",
            *["sign_random"] * (self.method == "cross_lora"),
        ]


@dataclass
class RidgeConfig(TransferConfig):
    penalty: Optional[float] = (
        0.1  # λ, in units of the mean diagonal of the Gram matrix; null chooses it on held-out positions
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None:
            within("transfer.penalty", self.penalty, 0, 1e6)


@dataclass
class ShiftConfig(TransferConfig):
    """Residual-shift matching. Its gain is what the regression finds: `transfer.gain` is not used."""

    # λ of the map between residual streams, in units of the mean diagonal of the Gram matrix; null chooses it on held-out positions
    map_penalty: Optional[float] = None
    penalty: float = 0.1  # λ of the regression on what enters a module

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map_penalty is not None:
            within("transfer.map_penalty", self.map_penalty, 0, 1e6)
        within("transfer.penalty", self.penalty, 0, 1e6)


@dataclass
class PlaceboConfig(TransferConfig):
    """What spoils the result, or the evidence, of a real method."""

    reference: str = "procrustes"  # the real method that is spoilt
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        methods = sorted(p.stem for p in (conf_dir() / "transfer").glob("*.yaml"))
        one_of(
            "transfer.reference",
            self.reference,
            tuple(m for m in methods if TRANSFER_SCHEMAS.get(m) is not PlaceboConfig),
        )


@dataclass
class SignRandomConfig(TransferConfig):
    seed: int = 0


@dataclass
class HardwareConfig:
    """One machine: everything that differs between a laptop, a 4090 at home and a server."""

    device: str = "auto"
    precision: str = "auto"
    devices: int = 1
    strategy: str = "auto"  # of training on several devices: auto is ddp
    deepspeed: Optional[str] = (
        None  # a DeepSpeed configuration of one's own (json); else ZeRO-2 with its optimizer in RAM
    )
    memory_gb: Optional[float] = None  # of one device, for task=validate
    threads: Optional[int] = None
    train_batch_size: int = 4
    evaluate_batch_tokens: Optional[int] = None  # auto: by device
    models_dir: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("hardware.device", self.device, ("auto", "cpu", "cuda"))
        one_of("hardware.precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        one_of("hardware.strategy", self.strategy, ("auto", "ddp", "fsdp", "deepspeed"))
        within("hardware.devices", self.devices, 1, 1024)
        if self.deepspeed is not None and self.strategy != "deepspeed":
            raise ConfigError(
                f"hardware.deepspeed: needs hardware.strategy=deepspeed, not {self.strategy}."
            )
        if self.strategy == "deepspeed" and self.device == "cpu":
            raise ConfigError(
                "hardware.strategy=deepspeed: needs GPUs. Choose ddp or fsdp, which also run on CPUs."
            )


@dataclass
class GivenConfig:
    """An adapter of the target model from elsewhere: task=pipeline trains none of its own then."""

    path: Optional[str] = None


@dataclass
class MergeConfig:
    """An adapter into its base."""

    precision: str = (
        "auto"  # of the merged weights: auto is the base's own; float32, bfloat16, float16
    )
    shard_gb: float = 5.0

    def __post_init__(self) -> None:
        one_of("merge.precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        within("merge.shard_gb", self.shard_gb, 0, 10**6, open_low=True)


@dataclass
class PredictConfig:
    """What is asked, and where answers go."""

    text: Optional[str] = None  # one text
    file: Optional[str] = (
        None  # a line each, or .jsonl rows with the fields that dataset.prompt names; - is stdin
    )
    output: Optional[str] = None  # JSON lines, continued if it is there; else stdout
    raw: bool = False  # texts are whole prompts: dataset.prompt is not put around them
    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        within("predict.max_new_tokens", self.max_new_tokens, 1, 10**6)
        within("predict.batch_size", self.batch_size, 1, 10**6)


@dataclass
class CompressConfig:
    """Post-training quantisation of a model's linear layers, by bitsandbytes."""

    scheme: str = "nf4"

    def __post_init__(self) -> None:
        one_of("compress.scheme", self.scheme, ("nf4", "int8"))


@dataclass
class PreferConfig:
    """Direct preference optimisation (arXiv 2305.18290), by TRL. Steps, batches and learning rate are those of `train`."""

    beta: float = 0.1  # how far from the base it may go: less is further
    loss: str = "sigmoid"

    def __post_init__(self) -> None:
        within("prefer.beta", self.beta, 0, 10**3, open_low=True)
        one_of("prefer.loss", self.loss, ("sigmoid", "hinge", "ipo"))


@dataclass
class SwanLabConfig:
    project: str = "paw"
    workspace: Optional[str] = None  # null: that of the key
    experiment: Optional[str] = None  # null: the run folder's name
    mode: str = "auto"  # online with a key, offline without
    dir: Optional[str] = None  # null: in the run folder

    def __post_init__(self) -> None:
        one_of(
            "tracker.swanlab.mode", self.mode, ("auto", "online", "offline", "local", "disabled")
        )


@dataclass
class WandbConfig:
    project: str = "paw"
    entity: Optional[str] = None
    experiment: Optional[str] = None
    mode: str = "auto"
    dir: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("tracker.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class TensorBoardConfig:
    dir: Optional[str] = None


@dataclass
class TrackerConfig:
    """Any number at once: tracker=[swanlab,tensorboard]."""

    swanlab: Optional[SwanLabConfig] = None
    wandb: Optional[WandbConfig] = None
    tensorboard: Optional[TensorBoardConfig] = None


@dataclass
class PathsConfig:
    outputs: str = "outputs"
    artifacts: str = "outputs/artifacts"
    models_dir: Optional[str] = None
    data_dir: Optional[str] = None


@dataclass
class PawConfig:
    task: str = "pipeline"
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    adapter: AdapterConfig = MISSING
    train: TrainConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    transfer: TransferConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracker: TrackerConfig = MISSING
    target_adapter: GivenConfig = field(default_factory=GivenConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    models: list[str] = field(
        default_factory=list
    )  # task=evaluate: names in conf/model, folders or hub ids
    adapters: list[str] = field(
        default_factory=list
    )  # task=evaluate: adapter folders, one pass each
    runs: list[str] = field(
        default_factory=list
    )  # task=compare: run folders, or files of records; the first is the reference
    everything: bool = False  # task=validate: every model, data set, adapter and experiment in conf/ instead of this composition
    force: list[str] = field(default_factory=list)  # stages to run again, of STAGES
    verify: bool = False  # read every artifact that is used in full; else only where its size or time has changed
    seed: int = 0
    name: Optional[str] = None  # of the run folder

    def __post_init__(self) -> None:
        tasks = sorted(p.stem for p in (conf_dir() / "task").glob("*.yaml"))
        one_of("task", self.task, tuple(tasks))
        for stage in self.force:
            one_of("force", stage, (*STAGES, "all"))


# The methods that have parameters of their own.
TRANSFER_SCHEMAS: dict[str, type[TransferConfig]] = {
    "ridge": RidgeConfig,
    "shift": ShiftConfig,
    "random": PlaceboConfig,
    "shuffled": PlaceboConfig,
    "negated": PlaceboConfig,
    "sign_random": SignRandomConfig,
}
DRAWN = ("random", "shuffled", "sign_random")  # placebos that differ from draw to draw


def register() -> None:
    """Tells Hydra the schemas. Safe to call twice; needed in every process that composes."""
    store = ConfigStore.instance()
    store.store(name="paw_schema", node=PawConfig)
    # In groups of their own, so that "choose from" lists only what a user can choose.
    for name, node in (("base", TransferConfig), *TRANSFER_SCHEMAS.items()):
        store.store(group="schema/transfer", name=name, node=node)
    for method, schema in ADAPTER_SCHEMAS.items():
        store.store(group="schema/adapter", name=method, node=schema)
    OmegaConf.register_new_resolver(
        "paw.lr",
        lambda mode, causal, classify: classify if mode == "classify" else causal,
        replace=True,
    )
    OmegaConf.register_new_resolver("paw.embedded", lambda name: str(embedded(name)), replace=True)
