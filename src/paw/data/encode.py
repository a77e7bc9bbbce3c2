"""Stage `encode`: a split as arrays of tokens, made once for all trainings on it and mapped into memory by every process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.load import examples, listed
from paw.data.tokenise import Encoded, encode, encode_for_head
from paw.errors import DataError
from paw.models.load import load_tokenizer
from paw.store import Input, Stage, Watch

STAGE = Stage("encode", "1", "paw.data.encode:tokens")
IDS, BOUNDS, STARTS, LABELS = "ids.npy", "bounds.npy", "starts.npy", "labels.npy"


@dataclass
class EncodeStage:
    dataset: DatasetConfig
    split: str
    form: str  # likelihood, letter or classify
    encoder: bool = (
        False  # classify: read sentences and pairs as an encoder does, not as one prompt
    )
    close: bool = False  # end answers with the model's end token
    max_length: int = 1024
    limit: int | None = None  # the first rows only
    trust_remote_code: bool = transient(False)


def tokens(
    config: EncodeStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """Writes the gold rows of a split.

    Args:
        inputs: `data`, and `tokenizer`, a model's folder known by its tokenizer alone.

    Raises:
        DataError: for rows that cannot be used, or if all are longer than max_length.
    """
    left_out: Counter[str] = Counter()
    found = examples(inputs["data"].path, config.dataset, config.split, config.form, left_out)[
        : config.limit
    ]
    rows = _encoded(
        found, config, load_tokenizer(inputs["tokenizer"].path, config.trust_remote_code)
    )
    kept = [
        (row, _label(e))
        for row, e in zip(rows, found, strict=True)
        if len(row.ids) <= config.max_length
    ]
    if not kept:
        raise DataError(
            f"{inputs['data'].path}: all {len(rows)} examples are longer than {config.max_length} tokens, the most that "
            "train.max_length and the model allow. Raise it, or shorten them."
        )
    if len(kept) < len(rows):
        left_out[f"more than {config.max_length} tokens"] = len(rows) - len(kept)
    if left_out:
        watch.say(f"{config.dataset.name}, {config.split}: left out {listed(left_out)}")
    lengths = np.array([len(row.ids) for row, _ in kept])
    np.save(out / IDS, np.concatenate([np.array(row.ids, dtype=np.int32) for row, _ in kept]))
    np.save(out / BOUNDS, np.concatenate([[0], lengths.cumsum()]))
    np.save(out / STARTS, np.array([row.start for row, _ in kept], dtype=np.int32))
    np.save(out / LABELS, np.array([label for _, label in kept], dtype=np.float32))
    first = found[0]
    classes = (
        list(first.continuations) if config.form == "classify" and first.value is None else None
    )
    return {
        "rows": len(kept),
        "left_out": dict(left_out),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "classes": classes,
    }


def _encoded(found: Sequence[Example], config: EncodeStage, tokenizer: Any) -> list[Encoded]:
    dataset = config.dataset
    if config.form != "classify":
        return encode(
            tokenizer,
            [(e.contexts[e.gold], e.continuations[e.gold]) for e in found],
            dataset.chat,
            config.close,
        )
    return encode_for_head(
        tokenizer,
        [e.texts for e in found],
        [e.contexts[0] for e in found],
        config.encoder,
        dataset.chat,
    )


def _label(example: Example) -> float:
    return float(example.gold) if example.value is None else example.value


class Rows:
    """The rows of a finished `encode` stage, read from the disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._ids = np.load(folder / IDS, mmap_mode="r")
        self.bounds, self.starts, self.labels = (
            np.load(folder / name) for name in (BOUNDS, STARTS, LABELS)
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Encoded:
        low, high = self.bounds[index], self.bounds[index + 1]
        return Encoded(
            tuple(self._ids[low:high].tolist()), int(self.starts[index]), float(self.labels[index])
        )

    @property
    def lengths(self) -> Any:
        return np.diff(self.bounds)
