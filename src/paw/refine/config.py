"""The schema of group refine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from paw.config.checks import one_of, transient, within
from paw.data.config import DatasetConfig
from paw.errors import ConfigError
from paw.models.load import Runtime
from paw.plugins import modules

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

SIGNALS = "refine/signals"  # the folder with a file for each signal
NONE = "none"
# What stands beside a refined adapter, at the same prompts, steps and learning rate.
CONTROLS = {
    "fresh": "the same from a fresh adapter: what the transferred one is worth as a start",
    "gains": "only a gain for each rank direction of the transferred adapter is learnt",
    "base": "the answers are the source base's: what distilling it alone brings",
    "shuffled": "the answers belong to other prompts",
    "own": "the target's own adapter, on the labelled data, after as many steps",
}
LEARNS = ("gains", "factors")
# What placebos are refined on, as reports name it.
OF_BASE, SHUFFLED = "the base's answers", "shuffled answers"


@dataclass
class RefineConfig:
    """`signal` names a file of that folder, or is `none`."""

    signal: str = NONE
    # Prompts: a text with one each line, or .jsonl rows with the fields that dataset.prompt names;
    # else the training split's questions without their answers.
    prompts: Optional[str] = transient(None)
    # Instead of prompts: a file of the same form with a few examples, from which a model writes
    # new ones. Where all examples share their choices, the new ones have them, too.
    seeds: Optional[str] = transient(None)
    writer: str = "target"  # or source: the base that writes them
    raw: bool = False  # lines of such files are whole prompts: dataset.prompt is not put around
    count: int = 512  # prompts at most; that are written, before what is of no use is left out
    held: int = 32  # prompts that are not trained on and decide when to stop; at most a fifth
    # What is asked of the source model. One greedy answer, or several that are drawn.
    max_new_tokens: int = 32
    samples: int = 1
    temperature: float = 1.0  # of answers that are drawn, and of prompts that are written
    beta: float = 1.0  # of signal `contrast`: how much of what the adapter changed
    top: int = 16  # of signal `tokens`: the likeliest tokens that are kept at each place
    # How it is learnt: a gain for each rank direction first, then the factors.
    start: str = "transferred"  # or fresh
    learn: list[str] = field(default_factory=lambda: list(LEARNS))
    steps: int = 20  # of the factors
    lr: float = 2e-4
    gain_steps: int = 10
    gain_lr: float = 0.05
    batch_size: int = 8  # prompts a step and device, with all their answers
    val_every: int = 2  # steps between looks at the prompts held out
    patience: int = 4  # looks that are no better than the best before it stops
    max_length: int = 1024  # tokens of a prompt with its answer
    seed: int = 0
    # Of CONTROLS, a list, or `standard`: all of them.
    controls: Any = field(default_factory=list, metadata={"transient": True})

    def __post_init__(self) -> None:
        one_of("refine.signal", self.signal, (NONE, *sorted(modules(SIGNALS))))
        one_of("refine.writer", self.writer, ("target", "source"))
        one_of("refine.start", self.start, ("transferred", "fresh"))
        within("refine.count", self.count, 4, 10**7)
        within("refine.held", self.held, 1, 10**6)
        within("refine.max_new_tokens", self.max_new_tokens, 1, 10**5)
        within("refine.samples", self.samples, 1, 1000)
        within("refine.temperature", self.temperature, 0, 100, open_low=True)
        within("refine.beta", self.beta, 0, 100)
        within("refine.top", self.top, 1, 10**5)
        within("refine.lr", self.lr, 0, 10, open_low=True)
        within("refine.gain_lr", self.gain_lr, 0, 10, open_low=True)
        within("refine.batch_size", self.batch_size, 1, 10**6)
        within("refine.val_every", self.val_every, 1, 10**6)
        within("refine.patience", self.patience, 1, 10**6)
        within("refine.max_length", self.max_length, 2, 10**7)
        for key, steps in (("steps", self.steps), ("gain_steps", self.gain_steps)):
            within(f"refine.{key}", steps, 1, 10**6)
            if steps < self.val_every:
                raise ConfigError(
                    f"refine.val_every={self.val_every}: is more than refine.{key}={steps}, so "
                    "nothing would say when to stop. Lower it."
                )
        if not self.learn:
            raise ConfigError("refine.learn: is empty. Name gains, factors, or both.")
        for what in self.learn:
            one_of("refine.learn", what, LEARNS)
        if self.start == "fresh" and "factors" not in self.learn:
            raise ConfigError(
                "refine.learn=[gains]: a fresh adapter does nothing yet, so it has no gains to "
                "learn. Add factors."
            )
        if self.prompts and self.seeds:
            raise ConfigError(
                "refine.prompts and refine.seeds: prompts are given, or written from seeds. "
                "Choose one."
            )
        if isinstance(self.controls, str):
            one_of("refine.controls", self.controls, ("standard", "a list as [a,b]"))
            self.controls = list(CONTROLS)
        for control in self.controls:
            one_of("refine.controls", str(control), tuple(CONTROLS))

    @property
    def on(self) -> bool:
        return self.signal != NONE


@dataclass(kw_only=True)
class TeachStage:
    """What a signal reads; the configuration of stage `teach`."""

    signal: str
    dataset: DatasetConfig
    max_new_tokens: int
    samples: int = 1
    temperature: float = 1.0
    beta: float = 1.0
    top: int = 16
    seed: int = 0
    runtime: Runtime
    trust_remote_code: tuple[bool, bool] = transient((False, False))  # of source and target
