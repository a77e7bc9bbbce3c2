"""An adapter as tokens and back, to the bit: which value of which tensor stands where."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paw.errors import AdapterError
from paw.generator.config import TokensConfig
from paw.store import write_text

if TYPE_CHECKING:
    import torch

LAYOUT = "layout.json"
Tensors = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Entry:
    """A tensor of an adapter."""

    name: str  # as PEFT saves it
    shape: tuple[int, ...]
    dtype: str  # float32, bfloat16, float16 or float64

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int:
        """The first number among its names; −1 where there is none."""
        numbers = [part for part in self.name.split(".") if part.isdigit()]
        return int(numbers[0]) if numbers else -1

    @property
    def module(self) -> str:
        """The module it sits on, without its layer: `self_attn.q_proj`."""
        path = re.split(r"\.lora_|\.ia3_", self.name)[0]
        return re.sub(r"^.*?\.\d+\.", "", path)

    @property
    def side(self) -> str:
        """What it is there: `lora_A`."""
        return self.name.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True)
class Row:
    """Tokens that belong together: those of a tensor, or a block of a fixed format."""

    layer: int
    module: str
    side: str
    tokens: int
    values: int


@dataclass(frozen=True)
class Layout:
    """Tensors in the order of their layer, module and side; each with tokens of its own, or all in
    one row that is cut into blocks of `count` tokens."""

    entries: tuple[Entry, ...]
    dim: int
    count: int | None = None

    @property
    def size(self) -> int:
        """Values of an adapter."""
        return sum(e.size for e in self.entries)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        if self.count is None:
            return tuple(
                Row(e.layer, e.module, e.side, math.ceil(e.size / self.dim), e.size)
                for e in self.entries
            )
        block = self.count * self.dim
        return tuple(
            Row(number, "block", "block", self.count, min(block, self.size - number * block))
            for number in range(math.ceil(self.size / block))
        )

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the tokens: that of all tensors, or the one that holds all of their values."""
        import torch

        kinds = {getattr(torch, e.dtype) for e in self.entries}
        found: torch.dtype = reduce(torch.promote_types, kinds)
        return found

    def pack(self, tensors: Tensors) -> torch.Tensor:
        """Tokens (tokens × dim) in `dtype`; places that no value has are 0."""
        import torch

        flat = [tensors[e.name].reshape(-1).to(self.dtype) for e in self.entries]
        if self.count is not None:
            flat = [torch.cat(flat)]
        full = [x.new_zeros(math.ceil(len(x) / self.dim) * self.dim) for x in flat]
        for place, x in zip(full, flat, strict=True):
            place[: len(x)] = x
        out = torch.cat(full).view(-1, self.dim)
        filled = out.new_zeros(self.tokens, self.dim)
        filled[: len(out)] = out
        return filled

    def unpack(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The way back, in the tensors' own types.

        Args:
            tokens: (tokens × dim), of any float type.
        """
        import torch

        flat, at, out = tokens.reshape(-1), 0, {}
        for e in self.entries:
            found = flat[at : at + e.size].reshape(e.shape)
            out[e.name] = found.to(getattr(torch, e.dtype)).clone()
            at += e.size if self.count is not None else math.ceil(e.size / self.dim) * self.dim
        return out

    @cached_property
    def places(self) -> NDArray[np.bool_]:
        """Which places of the tokens hold a value (tokens × dim)."""
        parts = []
        for row in self.rows:
            part = np.zeros(row.tokens * self.dim, dtype=bool)
            part[: row.values] = True
            parts.append(part)
        return np.concatenate(parts).reshape(-1, self.dim)

    def write(self, folder: Path) -> None:
        write_text(folder / LAYOUT, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Layout:
        held = json.loads((folder / LAYOUT).read_text())
        entries = tuple(Entry(e["name"], tuple(e["shape"]), e["dtype"]) for e in held["entries"])
        return cls(entries, held["dim"], held["count"])


def layout_of(tensors: Tensors, config: TokensConfig) -> Layout:
    """How tensors become tokens.

    Raises:
        AdapterError: where a fixed format does not hold them exactly, nor is told to shard.
    """
    entries = sorted(
        (Entry(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()),
        key=lambda e: (e.layer, e.module, e.side, e.name),
    )
    found = Layout(tuple(entries), config.dim, config.count)
    if config.count is not None and not config.shard:
        room = config.count * config.dim
        if found.size != room:
            whole = math.ceil(found.size / room)
            raise AdapterError(
                f"generator.tokens: the adapter has {found.size:,} values, and {config.count} "
                f"tokens of {config.dim} hold {room:,}. Nothing is cut or filled up: leave "
                "generator.tokens.count out, or set generator.tokens.shard=true "
                f"({whole} blocks)."
            )
    return found


def same_layout(first: str, a: Layout, second: str, b: Layout) -> None:
    """
    Raises:
        AdapterError: for adapters of different tensors, naming the first difference.
    """
    if a.entries == b.entries:
        return
    mine, theirs = ({e.name: e for e in x.entries} for x in (a, b))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise AdapterError(
                f"{second}: {name} is {_said(theirs.get(name))}, and {_said(mine.get(name))} in "
                f"{first}. A generator learns from adapters of one rank on the same modules."
            )


def _said(entry: Entry | None) -> str:
    return "missing" if entry is None else f"{'×'.join(map(str, entry.shape))} {entry.dtype}"


def bits(tokens: torch.Tensor) -> NDArray[Any]:
    """Tokens as numpy holds them: bfloat16, which it does not know, by its bits."""
    import torch

    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def from_bits(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The way back; a copy, as float32."""
    import torch

    found = torch.from_numpy(np.array(values))
    return (found.view(torch.bfloat16) if dtype == torch.bfloat16 else found).float()


def sides(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Pairs of factors: by the module's whole name, the number of the tensor of each side."""
    out: dict[str, dict[str, int]] = {}
    for number, entry in enumerate(entries):
        out.setdefault(entry.name.partition(".lora_")[0], {})[entry.side] = number
    return {k: v for k, v in out.items() if {"lora_A", "lora_B"} <= v.keys()}
