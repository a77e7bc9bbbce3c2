"""What stage `transfer` leaves for stage `gate`: the factors of every pair of modules on the
target, with their figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paw.models.adapters import Factors
from paw.store import write_text
from paw.transfer.figures import Row
from paw.transfer.modules import Layers

if TYPE_CHECKING:
    import torch

FACTORS, ROWS = "factors.safetensors", "rows.json"


@dataclass(frozen=True, kw_only=True)
class Moved:
    found: Sequence[tuple[Factors, Row]]  # a pair of modules each
    layers: Layers  # matched ones, (source, target)
    modules: Sequence[str]  # of the source's adapter


def write_moved(folder: Path, moved: Moved) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for i, (factors, _) in enumerate(moved.found):
        tensors |= {f"{i}.a": factors.a.contiguous(), f"{i}.b": factors.b.contiguous()}
    save_file(tensors, folder / FACTORS)
    rows = [row for _, row in moved.found]
    about = {"layers": list(moved.layers), "modules": list(moved.modules), "rows": rows}
    write_text(folder / ROWS, json.dumps(about))


def read_moved(folder: Path) -> Moved:
    from safetensors.torch import load_file

    tensors, about = load_file(folder / FACTORS), json.loads((folder / ROWS).read_text())
    found = [
        (Factors(tensors[f"{i}.a"], tensors[f"{i}.b"]), row) for i, row in enumerate(about["rows"])
    ]
    layers = [(source, target) for source, target in about["layers"]]
    return Moved(found=found, layers=layers, modules=about["modules"])
