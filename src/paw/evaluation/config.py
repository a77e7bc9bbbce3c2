"""The schema of group evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of, transient, within
from paw.data.config import MODES

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


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
