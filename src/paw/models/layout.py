"""How a model's modules are laid out: attention heads, and projections fused into one weight.

A fused weight is seen as its parts, by names of their own: rows of `…qkv_proj` are
`…qkv_proj.q_proj` and so on. Imports no torch: config.json and the shapes say everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.errors import ModelError

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Heads:
    """Attention heads of every layer; each key-value head serves query // keyvalue query heads."""

    query: int
    keyvalue: int
    dim: int
    theta: float  # base of the rotary frequencies θ^(−2i/dim)

    @property
    def shared(self) -> int:
        return self.query // self.keyvalue


def heads(folder: Path) -> Heads:
    """The heads that config.json names.

    Raises:
        ModelError: where it names none.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise ModelError(f"{folder / 'config.json'}: cannot be read as JSON.") from None
    config = config.get("text_config") or config
    if "num_attention_heads" not in config or "hidden_size" not in config:
        raise ModelError(
            f"{folder}: its config.json names no attention heads; this architecture is not known."
        )
    query = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    keyvalue = int(config.get("num_key_value_heads") or query)
    dim = int(config.get("head_dim") or config["hidden_size"] // query)
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return Heads(query, keyvalue, dim, theta)


@dataclass(frozen=True)
class Part:
    """Rows of a weight that hold one projection; `rows` None is the whole of an ordinary one."""

    module: str
    rows: slice | None = None


def parts(shapes: Mapping[str, tuple[int, int]], folder: Path) -> dict[str, Part]:
    """Every two-dimensional module by name, fused ones as their parts."""
    out: dict[str, Part] = {}
    for module, (rows, _) in shapes.items():
        fused = FUSED.get(module.rpartition(".")[2])
        if fused is None:
            out[module] = Part(module)
            continue
        if len(fused) == 3:
            h = heads(folder)
            sizes = [h.query * h.dim, h.keyvalue * h.dim, h.keyvalue * h.dim]
        else:
            sizes = [rows // 2, rows // 2]
        if sum(sizes) != rows:
            said = " + ".join(map(str, sizes))
            raise ModelError(f"{folder}: {module} has {rows} rows, its config says {said}.")
        start = 0
        for name, size in zip(fused, sizes, strict=True):
            out[f"{module}.{name}"] = Part(module, slice(start, start + size))
            start += size
    return out
