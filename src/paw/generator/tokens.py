"""Stage `tokens`: adapters as one array of tokens, in their own bits, mapped into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paw.errors import AdapterError
from paw.generator.checkpoints import (
    Checkpoint,
    base_of,
    find_checkpoints,
    read_tensors,
    settings,
)
from paw.generator.config import TokensConfig
from paw.generator.layout import Layout, bits, from_bits, layout_of, same_layout
from paw.models.adapters import CONFIG
from paw.store import Context, Input, Stage, write_text
from paw.text import some
from paw.training.files import TRAIL

if TYPE_CHECKING:
    import torch

ARRAY, LIST, DONE = "tokens.npy", "checkpoints.jsonl", "done.json"


@dataclass(kw_only=True)
class TokensStage:
    tokens: TokensConfig
    count: int | None = None  # adapters: the last so many of a trail or a folder
    skip_damaged: bool = False
    names: list[str] = field(default_factory=list)  # of adapters that are inputs of their own
    grouped: bool = False  # adapter i was trained on group i
    r: int | None = None  # of checkpoints that do not say how they are scaled
    alpha: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokensResult:
    checkpoints: int
    tokens: int  # of each
    dim: int
    values: int  # of each
    tensors: int
    dtype: str
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f"; left out as damaged: {some(self.skipped)}" if self.skipped else ""
        return (
            f"{self.checkpoints} adapters of {self.values:,} values as {self.tokens:,} tokens of "
            f"{self.dim}, {self.dtype}, whole and back to the bit{more}"
        )

    @property
    def said(self) -> str:
        places = self.tokens * self.dim
        return (
            f"Tokens: {self}. Coverage 100 % of {self.tensors} tensors; "
            f"{places - self.values:,} of {places:,} places hold no value."
        )


STAGE = Stage(
    "tokens",
    "1",
    "paw.generator.tokens:tokens",
    config=TokensStage,
    result=TokensResult,
    resumes=True,
)


def tokens(
    config: TokensStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> TokensResult:
    """Writes tokens.npy (adapters × tokens × dim), how they are laid out, which adapter is which,
    and the adapter_config.json that they share. Every adapter is unpacked again and compared.

    Args:
        inputs: `model`, the base; `folder`, from elsewhere; `trail`, a training that kept adapters;
            or adapters of their own under the names of the configuration.

    Raises:
        AdapterError: for adapters that are damaged, differ in tensors, belong to another base, or
            are fewer than asked for.
    """
    found, skipped = _whole(config, _found(config, inputs), context)
    base_of([c.path for c in found], inputs["model"].fingerprint)
    work, done = context.unfinished, _Done(context.unfinished / DONE)
    layout, array, kept = None, None, list[Checkpoint]()
    for number, checkpoint in enumerate(found):
        try:
            tensors = read_tensors(checkpoint.path)
        except AdapterError as e:
            raise _damaged(e, found[number:]) from None
        mine = layout_of(tensors, config.tokens)
        if layout is None:
            layout, first = mine, checkpoint.name
            array, begun = _array(work / ARRAY, (len(found), layout.tokens, layout.dim), layout)
            if not begun:
                done.reset()
        same_layout(first, layout, checkpoint.name, mine)
        assert array is not None
        if len(kept) >= done.count:
            packed = layout.pack(tensors)
            _prove(layout, packed, tensors, checkpoint)
            array[len(kept)] = bits(packed)
            array.flush()
            done.add()
        kept.append(checkpoint)
        context.progress(number + 1, len(found), "adapters")
    assert layout is not None
    del array
    done.reset()  # the array leaves this folder: what is begun again begins at the first
    os.replace(work / ARRAY, out / ARRAY)
    layout.write(out)
    shared = settings([c.path for c in kept], config.r, config.alpha)
    write_text(out / CONFIG, json.dumps(shared, indent=1, sort_keys=True))
    lines = [json.dumps(vars(replace(c, path=Path(c.name))), default=str) + "\n" for c in kept]
    write_text(out / LIST, "".join(lines))
    return TokensResult(
        checkpoints=len(kept),
        tokens=layout.tokens,
        dim=layout.dim,
        values=layout.size,
        tensors=len(layout.entries),
        dtype=str(layout.dtype).removeprefix("torch."),
        skipped=skipped,
    )


def _found(config: TokensStage, inputs: Mapping[str, Input]) -> list[Checkpoint]:
    if config.names:
        return [
            Checkpoint(
                name,
                inputs[name].path,
                task="" if config.grouped else name,
                group=number if config.grouped else None,
            )
            for number, name in enumerate(config.names)
        ]
    folder = inputs["trail"].path / TRAIL if "trail" in inputs else inputs["folder"].path
    found = find_checkpoints(folder)
    if config.count is not None and len(found) < config.count:
        raise AdapterError(
            f"{folder}: holds {len(found)} adapters, and {config.count} are asked for. Lower "
            "generator.count."
        )
    return found


def _whole(
    config: TokensStage, found: list[Checkpoint], context: Context
) -> tuple[list[Checkpoint], list[str]]:
    """The last so many that can be read, where damaged ones are to be left out, and those left out.

    Raises:
        AdapterError: where too few are left.
    """
    kept, skipped = found, list[str]()
    if config.skip_damaged:
        kept = []
        for checkpoint in found:
            try:
                read_tensors(checkpoint.path)
                kept.append(checkpoint)
            except AdapterError as e:
                context.say(str(e))
                skipped.append(checkpoint.name)
    if len(kept) < (config.count or 1):
        raise AdapterError(
            f"{found[0].path.parent}: {len(kept)} whole adapters, and {config.count or 1} are "
            "asked for. Lower generator.count."
        )
    return (kept[-config.count :] if config.count else kept), skipped


def _damaged(first: AdapterError, rest: Sequence[Checkpoint]) -> AdapterError:
    """All that are damaged, named at once."""
    bad = []
    for checkpoint in rest:
        try:
            read_tensors(checkpoint.path)
        except AdapterError:
            bad.append(checkpoint.name)
    return AdapterError(
        f"{first} Damaged in all ({len(bad)}): {', '.join(bad)}. To go on without: "
        "generator.skip_damaged=true."
    )


def _array(file: Path, shape: tuple[int, ...], layout: Layout) -> tuple[Any, bool]:
    """The array, and whether it is gone on with."""
    import torch

    kind = bits(torch.zeros(1, dtype=layout.dtype)).dtype
    if file.is_file():
        held = np.lib.format.open_memmap(file, mode="r+")
        if (held.shape, held.dtype) == (shape, kind):
            return held, True
    return np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape), False


def _prove(
    layout: Layout, packed: torch.Tensor, tensors: Mapping[str, torch.Tensor], who: Checkpoint
) -> None:
    import torch

    back = layout.unpack(packed)
    for name, value in tensors.items():
        if not torch.equal(back[name], value):
            raise AdapterError(f"{who.path}: {name} does not come back from its tokens as it was.")


class _Done:
    """How many adapters are in the array already."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.count: int = json.loads(file.read_text()) if file.is_file() else 0

    def add(self) -> None:
        self.count += 1
        write_text(self._file, json.dumps(self.count))

    def reset(self) -> None:
        self.count = 0
        self._file.unlink(missing_ok=True)


class Checkpoints:
    """What `tokens` wrote."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout.read(folder)
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        self._array = np.load(folder / ARRAY, mmap_mode="r")
        rows = map(json.loads, (folder / LIST).read_text().splitlines())
        self.all = [Checkpoint(**{**row, "path": Path(row["path"])}) for row in rows]

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, number: int) -> torch.Tensor:
        """An adapter's tokens (tokens × dim), float32."""
        return from_bits(self._array[number], self.layout.dtype)

    def mean_and_spread(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every place over some adapters, by Welford's recurrence (tokens × dim), float32."""
        import torch

        mean = torch.zeros(self.layout.tokens, self.layout.dim, dtype=torch.float64)
        sums = torch.zeros_like(mean)
        for n, number in enumerate(numbers, 1):
            value = self[number].double()
            delta = value - mean
            mean += delta / n
            sums += delta * (value - mean)
        return mean.float(), (sums / max(1, len(numbers))).sqrt().float()
