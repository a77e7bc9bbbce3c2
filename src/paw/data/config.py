"""The schema of group dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from paw import plugins
from paw.config.checks import one_of, transient
from paw.data.fields import FieldsConfig, names
from paw.errors import ConfigError

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass(kw_only=True)
class DatasetConfig:
    """Questions with choices, or texts with an answer."""

    name: str = transient(MISSING)
    # a file in data/kinds
    kind: str = "question"
    prompt: str = "Question: {question}\nAnswer:"
    # where the options stand in the prompt under letters
    letter_prompt: str = "Question: {question}\n{options}\nAnswer:"
    # wrap the prompt in the model's own chat template
    chat: bool = False
    # how it is evaluated, unless evaluate.mode says otherwise
    mode: str = transient("likelihood")
    # where a generated answer ends
    stop: list[str] = field(default_factory=lambda: ["Question:", "</s>", "<|im_end|>"])
    # the choice whose F1 is reported, counted from 0
    f1: Optional[int] = None
    # or skip: rows that cannot be scored are left out and counted
    bad_rows: str = "refuse"
    # Where the rows come from is known by their content: a folder of <split>.jsonl[.gz] or one
    # file; else paths.data_dir/<name>; else the hub.
    path: Optional[str] = transient(None)
    hub: Optional[str] = transient(None)
    subset: Optional[str] = transient(None)
    revision: Optional[str] = transient(None)
    # How the hub's rows become normalised ones; without it the kind knows. It is part of keys,
    # since files may hold the hub's own rows.
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    # unlabelled text for transfer, a document a line; else paw's (English)
    calibration: Optional[str] = transient(None)
    train_split: str = transient("train")
    # for train.val_every
    val_split: Optional[str] = transient(None)
    eval_split: str = transient("test")
    # names of the labels, in their order, where rows have none
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("dataset.kind", self.kind, tuple(sorted(plugins.modules("data/kinds"))))
        one_of("dataset.mode", self.mode, tuple(plugins.modules("evaluation/modes")))
        one_of("dataset.bad_rows", self.bad_rows, ("refuse", "skip"))
        names("dataset.prompt", self.prompt)
        names("dataset.letter_prompt", self.letter_prompt)
        if any(not text for text in self.stop):
            raise ConfigError("dataset.stop: an empty text would end every answer at once.")
