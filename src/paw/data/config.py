"""The schema of group dataset."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from string import Formatter
from typing import Optional

from omegaconf import MISSING

from paw.config.checks import one_of, transient
from paw.errors import ConfigError
from paw.paths import PACKAGE

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

MODES = ("likelihood", "letter", "generate", "classify")


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
