"""The schemas of group transfer that methods share; a method's own stands in its file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from paw.config.checks import one_of, transient, within
from paw.errors import ConfigError
from paw.transfer.modules import ROLES

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

EVIDENCE = ("weights", "embeddings", "text", "models")
LAYERS = ("proportional", "index", "cka", "similarity")
# What only stage `gate` reads, at its defaults: the stages before do not depend on it.
GATED: dict[str, Any] = {"similarity": "raw", "similarity_threshold": 1e-4, "keep_top": 1.0}


@dataclass
class TransferConfig:
    """What every method shares; a method's own parameters stand in a subclass."""

    method: str = MISSING
    # What the method looks at: both models' weights; also their embeddings of shared tokens;
    # moments of both's activations on a text; or the running models themselves.
    evidence: str = "text"
    layers: str = "proportional"
    # The layers that a matching leaves out join their nearest: added up, or divided. Published
    # methods leave them out.
    spread: bool = True
    gain: str = "activation"  # none, weight, activation, or a number
    # Singular vectors kept a side; else 320, and at most half of the smallest dimension.
    basis: Optional[int] = None
    # What the gate looks at. raw: overlap of the mapped source subspaces with the target's;
    # excess: that above chance; weights: the source systems' measure, ‖U_sᵀU_t‖²/k² of the weights
    # as they are, whose chance is 1 in the larger width.
    similarity: str = "raw"
    similarity_threshold: float = 1e-4
    # Roles that are transferred, such as [q_proj,v_proj]; empty: all.
    modules: list[str] = field(default_factory=list)
    # The share of the target's layers, the most similar ones, that are transferred.
    keep_top: float = 1.0
    positions: int = 16384  # calibration positions
    # A text file, a document a line; else the data set's own text, else paw's (English).
    calibration: Optional[str] = transient(None)
    batch_size: int = transient(32)  # calibration texts at a time
    # For moments: kept if they fit, else streamed in groups of layers that do.
    memory_gb: float = transient(8.0)
    workers: int = transient(1)  # modules read and decomposed ahead, each in a thread
    # Other methods shown beside, a list; or `standard`, the placebos that this method can have.
    controls: Any = field(default_factory=list, metadata={"transient": True})
    draws: int = transient(5)  # of each placebo that is drawn by chance

    def __post_init__(self) -> None:
        one_of("transfer.evidence", self.evidence, EVIDENCE)
        one_of("transfer.layers", self.layers, LAYERS)
        one_of("transfer.similarity", self.similarity, ("raw", "excess", "weights"))
        for role in self.modules:
            one_of("transfer.modules", role, tuple(ROLES))
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
            from paw.transfer.controls import standard

            one_of("transfer.controls", self.controls, ("standard", "a list as [a,b]"))
            self.controls = standard(self)
        if not isinstance(self.controls, list) or not all(
            isinstance(c, str) for c in self.controls
        ):
            raise ConfigError("transfer.controls: give a list of methods as [a,b], or standard.")

    @property
    def uses_text(self) -> bool:
        """Whether both models are run on a text; else weights are enough."""
        return self.looks_at_text or self.gain == "activation"

    @property
    def looks_at_text(self) -> bool:
        """Whether the method itself pairs positions of a text, whatever the gain does."""
        return self.evidence in ("text", "models")


@dataclass
class PlaceboConfig(TransferConfig):
    """What spoils the result, or the evidence, of a real method."""

    reference: str = "procrustes"  # the real method that is spoilt
    seed: int = 0

    def __post_init__(self) -> None:
        from paw.transfer.controls import real_methods

        super().__post_init__()
        one_of("transfer.reference", self.reference, tuple(real_methods()))
