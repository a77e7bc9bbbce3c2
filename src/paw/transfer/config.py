"""The schemas of group transfer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError
from paw.paths import conf_dir

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

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
