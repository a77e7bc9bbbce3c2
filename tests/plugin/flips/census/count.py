"""Stage `count`: how many rows a split has, and how many letters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.data.config import DatasetConfig
from paw.data.load import examples
from paw.store import Context, Input, Stage


@dataclass
class CountStage:
    dataset: DatasetConfig
    split: str
    letters: str = "aeiou"


@dataclass(frozen=True)
class CountResult:
    rows: int
    letters: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.letters} letters"


STAGE = Stage("count", "1", "flips.census.count:count", config=CountStage, result=CountResult)


def count(
    config: CountStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> CountResult:
    found = examples(inputs["data"].path, config.dataset, config.split)
    text = "".join(str(e.contexts[0]) for e in found)
    (out / "text.txt").write_text(text, encoding="utf-8")
    return CountResult(len(found), sum(text.count(letter) for letter in config.letters))
