"""Stage `encode`: a split as arrays of tokens, made once for all trainings on it and mapped into
memory by every process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paw.config.checks import transient
from paw.data import tokenise
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.load import examples, listed
from paw.data.tokenise import Encoded, Shares
from paw.errors import DataError
from paw.models.load import check_tokens, is_encoder, limits, load_tokenizer, room
from paw.store import Input, Stage, Watch, write_text

IDS, BOUNDS, STARTS, LABELS = "ids.npy", "bounds.npy", "starts.npy", "labels.npy"
WEIGHTS, ABOUT = "weights.npy", "rows.json"
SOFT = ("soft_counts.npy", "soft_ids.npy", "soft_shares.npy")  # only of rows that have some


@dataclass(kw_only=True)
class EncodeStage:
    dataset: DatasetConfig
    split: str
    form: str  # likelihood, letter or classify
    close: bool = False  # end answers with the model's end token
    max_length: int = 1024  # tokens of an example at most, where the model has as many places
    virtual: int = 0  # places of the model that an adapter's virtual tokens take
    limit: int | None = None  # the first rows only
    group: int | None = None  # only the examples of one line of input `groups`
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    rows: int
    tokens: int
    longest: int  # tokens
    left_out: dict[str, int] = field(default_factory=dict)  # rows by the reason they were left out

    def __str__(self) -> str:
        return f"{self.rows} examples, {self.tokens} tokens"


STAGE = Stage("encode", "4", "paw.data.encode:encode", config=EncodeStage, result=EncodeResult)


def encode(
    config: EncodeStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> EncodeResult:
    """Writes the gold rows of a split. Those that are longer than max_length, or than the model has
    places beside virtual tokens, are left out and counted.

    Args:
        inputs: `data`, and `tokenizer`, a model's folder known by its tokenizer, the places it has,
            and whether it is an encoder; `groups`, a file of lines {examples: ids}, where only
            one of them is wanted.

    Raises:
        DataError: for rows that cannot be used, or if all are too long.
        ModelError: for tokens that the model does not have.
    """
    left_out: Counter[str] = Counter()
    model, data = inputs["tokenizer"].path, inputs["data"].path
    found = examples(data, config.dataset, config.split, config.form, left_out)[: config.limit]
    if config.group is not None:
        found = _of_group(found, inputs["groups"].path, config.group)
    longest = min(config.max_length, (room(model) or 10**9) - config.virtual)
    rows = _encoded(found, config, model)
    known = limits(model, config.trust_remote_code).vocabulary
    check_tokens(model, max(max(r.ids) for r in rows), known)
    kept = [
        replace(r, label=_label(e))
        for r, e in zip(rows, found, strict=True)
        if len(r.ids) <= longest
    ]
    if not kept:
        raise DataError(
            f"{data}: all {len(rows)} examples are longer than {longest} tokens, the most that "
            "train.max_length and the model allow. Raise it, or shorten them."
        )
    if len(kept) < len(rows):
        left_out[f"more than {longest} tokens"] = len(rows) - len(kept)
    if left_out:
        watch.say(f"{config.dataset.name}, {config.split}: left out {listed(left_out)}")
    named = config.form == "classify" and found[0].value is None
    names = [e.id for e, r in zip(found, rows, strict=True) if len(r.ids) <= longest]
    write_rows(out, kept, found[0].continuations if named else None, names)
    lengths = [len(row.ids) for row in kept]
    return EncodeResult(
        rows=len(kept), tokens=sum(lengths), longest=max(lengths), left_out=dict(left_out)
    )


def _of_group(found: Sequence[Example], groups: Path, number: int) -> list[Example]:
    """
    Raises:
        DataError: where there are fewer groups, or one names examples that are not there.
    """
    lines = groups.read_text(encoding="utf-8").splitlines()
    if number >= len(lines):
        raise DataError(
            f"{groups}: has {len(lines)} groups of examples, and number {number + 1} is asked for. "
            "Ask for fewer, or give more examples."
        )
    wanted = json.loads(lines[number])["examples"]
    by_id = {e.id: e for e in found}
    if missing := [name for name in wanted if name not in by_id]:
        raise DataError(f"{groups}, line {number + 1}: there is no example {missing[0]!r}.")
    return [by_id[name] for name in wanted]


def write_rows(
    folder: Path,
    rows: Sequence[Encoded],
    classes: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Rows as `Rows` reads them.

    Args:
        classes: that a classifier is to tell apart.
        names: the rows' ids in their data set.
    """
    bounds = np.concatenate([[0], np.array([len(row.ids) for row in rows]).cumsum()])
    np.save(folder / IDS, np.concatenate([np.array(row.ids, dtype=np.int32) for row in rows]))
    np.save(folder / BOUNDS, bounds)
    np.save(folder / STARTS, np.array([row.start for row in rows], dtype=np.int32))
    np.save(folder / LABELS, np.array([row.label for row in rows], dtype=np.float32))
    np.save(folder / WEIGHTS, np.array([row.weight for row in rows], dtype=np.float32))
    if any(row.soft for row in rows):
        _write_soft(folder, rows)
    write_text(
        folder / ABOUT, json.dumps({"classes": classes and list(classes), "names": list(names)})
    )


def _write_soft(folder: Path, rows: Sequence[Encoded]) -> None:
    """What is learnt in the place of each token of the continuations, row after row: how many
    tokens, which, and their shares."""
    each = [shares for row in rows for shares in row.shares]
    found = [pair for shares in each for pair in shares]
    arrays = (
        np.array([len(shares) for shares in each], dtype=np.int32),
        np.array([token for token, _ in found], dtype=np.int32),
        np.array([share for _, share in found], dtype=np.float32),
    )
    for name, array in zip(SOFT, arrays, strict=True):
        np.save(folder / name, array)


def _encoded(found: Sequence[Example], config: EncodeStage, model: Path) -> list[Encoded]:
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    chat = config.dataset.chat
    if config.form != "classify":
        pairs = [(e.contexts[e.gold], e.continuations[e.gold]) for e in found]
        return tokenise.encode(tokenizer, pairs, chat, config.close)
    texts, prompts = [e.texts for e in found], [e.contexts[0] for e in found]
    return tokenise.encode_for_head(tokenizer, texts, prompts, is_encoder(model), chat)


def _label(example: Example) -> float:
    return float(example.gold) if example.value is None else example.value


class Rows:
    """The rows that `write_rows` wrote, read from the disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = np.load(folder / IDS, mmap_mode="r")
        arrays = (np.load(folder / name) for name in (BOUNDS, STARTS, LABELS, WEIGHTS))
        self.bounds, self.starts, self.labels, self.weights = arrays
        self._soft: tuple[Any, ...] = ()
        if (folder / SOFT[0]).is_file():
            counts, *found = (np.load(folder / name, mmap_mode="r") for name in SOFT)
            # where each row's tokens begin, and where the shares of each token
            places = np.concatenate([[0], (self.lengths - self.starts).cumsum()])
            self._soft = (places, np.concatenate([[0], counts.cumsum()]), *found)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Encoded:
        low, high = self.bounds[index], self.bounds[index + 1]
        ids = tuple(self._ids[low:high].tolist())
        label, weight = float(self.labels[index]), float(self.weights[index])
        return Encoded(ids, int(self.starts[index]), label, weight, self._shares(index))

    def _shares(self, index: int) -> tuple[Shares, ...]:
        if not self._soft:
            return ()
        places, bounds, tokens, shares = self._soft
        cuts = bounds[places[index] : places[index + 1] + 1]
        return tuple(
            tuple(zip(tokens[a:b].tolist(), shares[a:b].tolist(), strict=True))
            for a, b in pairwise(cuts)
        )

    @property
    def lengths(self) -> Any:
        """Tokens of each row, as an array."""
        return np.diff(self.bounds)

    @property
    def names(self) -> list[str]:
        """The rows' ids in their data set."""
        found: list[str] = json.loads((self._folder / ABOUT).read_text())["names"]
        return found

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Of a classifier's rows; None where a value is to be found, and of answers."""
        classes = json.loads((self._folder / ABOUT).read_text())["classes"]
        return None if classes is None else tuple(classes)
