"""The schemas of the groups evaluate and predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from paw.config.checks import one_of, transient, within
from paw.plugins import load, modules

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

MODES = "evaluation/modes"  # the folder with a file for each mode


@dataclass(kw_only=True)
class EvaluateConfig:
    """How questions are put and answered: `mode` names a file in paw/evaluation/modes."""

    mode: str = "likelihood"
    num_fewshot: int = 0  # solved questions before each, the same for all
    fewshot_split: Optional[str] = transient(None)  # where they are drawn; else the train split
    sample_ratio: float = 1.0  # a seeded sample of the split
    # at most so many of it, drawn by the seed (lm-evaluation-harness takes the first)
    limit: Optional[int] = None
    split: Optional[str] = transient(None)  # instead of the data set's own
    seed: int = 0
    max_new_tokens: int = 256  # of a generated answer
    batch_tokens: Optional[int] = transient(None)  # in a batch; else by device
    records: str = transient("jsonl")  # or parquet: the per-example results in the run folder

    def __post_init__(self) -> None:
        one_of("evaluate.mode", self.mode, tuple(modules(MODES)))
        one_of("evaluate.records", self.records, ("jsonl", "parquet"))
        within("evaluate.sample_ratio", self.sample_ratio, 0, 1, open_low=True)
        within("evaluate.num_fewshot", self.num_fewshot, 0, 1000)
        within("evaluate.max_new_tokens", self.max_new_tokens, 1, 10**6)
        if self.batch_tokens is not None:
            within("evaluate.batch_tokens", self.batch_tokens, 1, 10**9)
        if self.limit is not None:
            within("evaluate.limit", self.limit, 1, 10**9)

    def form(self, kind: str) -> str:
        """What `paw.data.load.examples` makes of a row of a kind of data: `likelihood` (its
        choices as they are), `letter` (their letters) or `classify` (a class)."""
        found: str = load(MODES, self.mode, "evaluate.mode").form(kind)
        return found


@dataclass(kw_only=True)
class PredictConfig:
    """What is asked, and where answers go."""

    text: Optional[str] = None  # one text
    # a text each line, or .jsonl rows with the fields that dataset.prompt names; - is stdin
    file: Optional[str] = None
    output: Optional[str] = None  # JSON lines, continued if it is there; else stdout
    raw: bool = False  # texts are whole prompts: dataset.prompt is not put around them
    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        within("predict.max_new_tokens", self.max_new_tokens, 1, 10**6)
        within("predict.batch_size", self.batch_size, 1, 10**6)
